"""`longctx launch --print`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from longctx.cli.main import main


def test_print_shows_everything_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_run import write

    path = write(tmp_path)
    path.write_text(path.read_text() + "launch: {launcher: deepspeed, hosts: [one, two], environment: [SECRET_*]}\n")
    monkeypatch.setenv("SECRET_KEY", "canary-in-the-environment")
    before = sorted(tmp_path.rglob("*"))

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError(f"ran {arguments}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    main_code = []
    try:
        main(["launch", str(path), "--print", "mesh.data=2"])
    except SystemExit as end:
        main_code.append(end.code)
    shown = capsys.readouterr().out
    assert main_code == [0] and sorted(tmp_path.rglob("*")) == before
    assert "SECRET_KEY (25 characters)" in shown and "canary" not in shown
    assert "deepspeed: 4 ranks on 2 hosts" in shown and "0 of 4 ring hops" in shown
    assert shown.count("ssh -T") == 2 and f"{tmp_path}/run/launch/ticket.json" in shown
    assert "GLOO_SOCKET_IFNAME" in shown

"""Commands in a deleted working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def exits(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    "command", [["check", CONFIG], ["explain", CONFIG], ["plan", CONFIG], ["init"], ["data", "build", CONFIG]]
)
def test_a_deleted_folder(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert exits(command) == 2
    assert capsys.readouterr().err == "the folder in which this command runs was deleted; change to one that exists\n"

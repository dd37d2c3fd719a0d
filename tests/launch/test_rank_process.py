"""What every rank process does around its work."""

from __future__ import annotations

import os
import sys

import pytest

from longctx.errors import ConfigError, DataError
from longctx.launch import rank_process


def test_only_rank_0_prints_a_configuration_error(capsys: pytest.CaptureFixture[str]) -> None:
    rank_process.print_error(1, ConfigError("bad key"))
    rank_process.print_error(0, ConfigError("bad key"))
    rank_process.print_error(1, DataError("truncated"))
    assert capsys.readouterr().err == "longctx: bad key\nlongctx: rank 1: truncated\n"


def test_the_console_is_rank_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGCTX_CONSOLE", raising=False)
    assert rank_process.console(1) is None and rank_process.console(0) is sys.stdout
    reading, writing = os.pipe()
    monkeypatch.setenv("LONGCTX_CONSOLE", str(writing))
    stream = rank_process.console(0)
    assert stream is not None
    stream.write("step 1\n")
    stream.close()
    assert os.read(reading, 100) == b"step 1\n"
    os.close(reading)


def test_under_another_launcher_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGCTX_PARENT", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    rank_process.die_with_parent()
    rank_process.join(1)
    assert rank_process.world_size() == 3


def test_a_success_exits_with_its_code() -> None:
    for code in (0, 75):
        with pytest.raises(SystemExit) as end:
            rank_process.end(code)
        assert end.value.code == code

"""One build at a time in a folder, and read-only folders that hold a build."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from longctx.data.tokens.lock import locked
from longctx.data.tokens.record import RECORD
from longctx.errors import DataError


def test_a_second_build_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path / "made"):
            order.append("second")

    with locked(tmp_path / "made") as writable:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert writable and order == ["first", "second"]


def test_a_read_only_folder_needs_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(DataError, match="cannot be written"), locked(tmp_path):
        pass
    (tmp_path / RECORD).write_text("{}")
    with locked(tmp_path) as writable:
        assert writable is False

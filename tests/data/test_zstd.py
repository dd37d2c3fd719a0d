"""zstd: any number of frames, read like plain text; truncated and damaged files raise."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest

from longctx.data.sources.text import open_source
from longctx.errors import DataError, MissingPackageError

LINES = "".join(f'{{"text": "text {number} größer"}}\n' for number in range(20_000))


def test_zstd_is_read(tmp_path: Path) -> None:
    if find_spec("zstandard") is None:
        return test_the_package_is_an_extra(tmp_path)
    import zstandard

    half = len(LINES) // 2
    compress = zstandard.ZstdCompressor(write_checksum=True).compress  # as the command zstd does
    raw = b"".join(compress(part.encode()) for part in (LINES[:half], LINES[half:]))
    (tmp_path / "x.jsonl.zst").write_bytes(raw)
    texts = [document.text for document in open_source(tmp_path).documents()]
    assert texts == [f"text {number} größer" for number in range(20_000)]
    for damaged in (raw[:-9], raw[: len(raw) // 2 + 99], raw[:200] + b"\xff" * 9 + raw[209:]):
        (tmp_path / "x.jsonl.zst").write_bytes(damaged)
        with pytest.raises(DataError, match="x.jsonl.zst: cannot be read on, it is damaged"):
            list(open_source(tmp_path).documents())


def test_the_package_is_an_extra(tmp_path: Path) -> None:
    (tmp_path / "x.zst").write_bytes(b"\x28\xb5\x2f\xfd and more")
    words = r"x.zst: reading zstd needs the package `zstandard`.*zstd -d"
    with patch.dict(sys.modules, {"zstandard": None}), pytest.raises(MissingPackageError, match=words):
        list(open_source(tmp_path / "x.zst").documents())

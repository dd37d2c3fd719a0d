"""Parquet, Arrow and saved datasets, as the packages write them; without `pyarrow`, the error that names it."""

from __future__ import annotations

import itertools
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from longctx.data.sources.document import CHAT, PAIR, TEXT
from longctx.data.sources.text import open_source
from longctx.errors import DataError, MissingPackageError

CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
TALKS: list[Any] = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    [{"role": "user", "content": "When?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
]


def read(path: Path | str, **settings: Any) -> list[tuple[str, Any]]:
    found = [(d.kind, d.text) for d in open_source(path, **settings).documents()]
    return [(kind, text if kind == TEXT else json.loads(text)) for kind, text in found]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        opened = pyarrow.ipc.new_stream if path.suffix == ".arrow" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    return path


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather"])
def test_texts_and_conversations(tmp_path: Path, name: str) -> None:
    if find_spec("pyarrow") is None:
        return test_the_package_is_an_extra(tmp_path, name)
    texts = [{"text": f"text {n}", "id": n} for n in range(150)]
    assert read(write(tmp_path / name, texts)) == [(TEXT, row["text"]) for row in texts]
    assert read(tmp_path) == read(tmp_path / name)
    assert read(write(tmp_path / name, [{"messages": talk, "source": "x"} for talk in TALKS])) == [
        (CHAT, {"messages": talk}) for talk in TALKS
    ]
    pair = {"prompt": "a", "completion": "b"}
    assert read(write(tmp_path / name, [pair | {"text": "ab"}]), format="chat") == [(PAIR, pair)]
    with pytest.raises(DataError, match=r"no column 'body' \(found: 'text'"):
        read(write(tmp_path / name, texts), field="body")
    with pytest.raises(DataError, match=r"no messages, and no prompt with a completion \(found: 'text', 'id'\)"):
        read(tmp_path / name, format="chat")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    if name != "x.arrow":  # a stream ends where it ends
        with pytest.raises(DataError, match="it is damaged"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather"])
def test_the_package_is_an_extra(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes({"x.parquet": b"PAR1", "x.feather": b"ARROW1"}.get(name, b"\xff" * 4) + bytes(20))
    words = rf"{name}: reading (parquet|Arrow) needs the package `pyarrow`: pip install 'longctx\[data\]'"
    without = {"pyarrow": None, "pyarrow.parquet": None}
    with patch.dict(sys.modules, without), pytest.raises(MissingPackageError, match=words):
        read(tmp_path / name)


def test_saved_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("datasets") is None:
        return test_the_package_is_an_extra(tmp_path, "x.arrow")
    import datasets

    numbers = itertools.count()  # a data set is named by a pickle of itself, which fails with some versions of pyarrow
    monkeypatch.setattr(datasets.fingerprint, "generate_fingerprint", lambda _: f"{next(numbers):016}")
    monkeypatch.setattr(datasets.arrow_dataset, "generate_fingerprint", lambda _: f"{next(numbers):016}")
    monkeypatch.setattr(datasets.fingerprint, "update_fingerprint", lambda *_: f"{next(numbers):016}")
    rows = datasets.Dataset.from_list([{"messages": talk} for talk in TALKS * 20])
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    assert read(tmp_path / "one") == [(CHAT, {"messages": talk}) for talk in TALKS * 20]
    rows.select([3, 0]).save_to_disk(tmp_path / "chosen")
    assert read(tmp_path / "chosen") == [(CHAT, {"messages": talk}) for talk in TALKS[::-1]]
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="two holds the splits test, train of a dataset; give the folder of one"):
        read(tmp_path / "two")
    assert read(tmp_path / "two" / "train") == read(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="state.json: not what `datasets` writes"):
        read(tmp_path / "one")

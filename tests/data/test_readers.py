"""Other formats: files written here byte by byte from their descriptions are read, and written back the same."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.loader import ShardedLoader
from longctx.data.sources.readers import (
    import_tokens,
    read_datatrove,
    read_megatron,
    read_nanogpt,
    write_datatrove,
    write_megatron,
    write_nanogpt,
)
from longctx.data.tokens.file import TokenFile, TokenStore
from longctx.errors import DataError

HASH = "cd" * 32
DOCUMENTS = [[5, 6, 0], [7, 0], [8, 9, 10, 0]]
FLAT = [token for document in DOCUMENTS for token in document]


def nanogpt(folder: Path, letter: str) -> Path:
    (folder / "x.bin").write_bytes(struct.pack(f"<9{letter}", *FLAT))
    return folder / "x.bin"


def megatron(folder: Path, letter: str) -> Path:
    size, code = (2, 8) if letter == "H" else (4, 4)
    (folder / "x.bin").write_bytes(struct.pack(f"<9{letter}", *FLAT))
    counts = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
    (folder / "x.idx").write_bytes(
        counts
        + struct.pack("<3i", 3, 2, 4)
        + struct.pack("<3q", 0, 3 * size, 5 * size)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
    return folder / "x.idx"


def datatrove(folder: Path, letter: str) -> Path:
    (folder / "x.ds").write_bytes(struct.pack(f"<9{letter}", *FLAT))
    (folder / "x.ds.index").write_bytes(struct.pack("<3Q", 3, 5, 9))
    return folder / "x.ds"


def read_nanogpt_documents(path: Path, vocabulary_size: int) -> TokenStore:
    dtype = "uint16" if vocabulary_size < 2**16 else "uint32"
    return read_nanogpt(path, vocabulary_size, end_of_document=0, dtype=dtype)


FORMATS: dict[str, tuple[Callable, Callable, Callable]] = {
    "nanogpt": (nanogpt, read_nanogpt_documents, write_nanogpt),
    "megatron": (megatron, read_megatron, write_megatron),
    "datatrove": (datatrove, read_datatrove, write_datatrove),
}


@pytest.mark.parametrize("vocabulary_size", [11, 100_000])
@pytest.mark.parametrize("name", FORMATS)
def test_byte_exact_round_trip(tmp_path: Path, name: str, vocabulary_size: int) -> None:
    make, read, write = FORMATS[name]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "back").mkdir()
    letter = "H" if vocabulary_size < 2**16 else "i" if name == "megatron" else "I"
    path = make(tmp_path / "theirs", letter)
    store = read(path, vocabulary_size)
    assert [store.document(i).tolist() for i in range(store.document_count)] == DOCUMENTS
    import_tokens(store, tmp_path / "ours.tokens", HASH, origin=name)
    with TokenFile(tmp_path / "ours.tokens", tokenizer_hash=HASH) as ours:
        ours.verify()
        assert [ours.document(i).tolist() for i in range(3)] == DOCUMENTS and ours.metadata["origin"] == name
        write(ours, tmp_path / "back" / path.name)
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_the_loader_takes_them_as_they_are(tmp_path: Path, name: str) -> None:
    make, read, _ = FORMATS[name]
    store = read(make(tmp_path, "H"), 11)
    with ShardedLoader(store, 9, shuffle=False) as loader:
        (micro,) = next(loader)
    assert micro["input_ids"][0].tolist() == [*FLAT, 0]  # zigzag pads to an even length
    assert micro["labels"][0].tolist() == [6, 0, -100, 0, -100, 9, 10, 0, -100, -100]
    (tmp_path / "elsewhere").mkdir()
    assert store.identity == read(make(tmp_path / "elsewhere", "H"), 11).identity


@pytest.mark.parametrize("name", FORMATS)
def test_truncation_and_foreign_tokens_are_named(tmp_path: Path, name: str) -> None:
    make, read, _ = FORMATS[name]
    make(tmp_path, "H")
    for file in sorted(tmp_path.iterdir()):
        path, raw = file, file.read_bytes()
        for size in range(0, len(raw)):
            if name == "nanogpt" and size and size % 2 == 0:
                continue  # this format cannot tell; import it to be safe from then on
            file.write_bytes(raw[:size])
            with pytest.raises(DataError):
                read(make_path(tmp_path, name), 11)
        file.write_bytes(raw)
        path.unlink()
        with pytest.raises(DataError, match="does not exist"):
            read(make_path(tmp_path, name), 11)
        file.write_bytes(raw)
    with pytest.raises(DataError, match=r"token 7 \(document 2\) is 10, outside the vocabulary of 10"):
        read(make_path(tmp_path, name), 10)


def make_path(folder: Path, name: str) -> Path:
    return folder / {"nanogpt": "x.bin", "megatron": "x", "datatrove": "x.ds"}[name]


def test_wrong_dtype_of_a_file_without_a_header(tmp_path: Path) -> None:
    path = nanogpt(tmp_path, "I")
    assert read_nanogpt(path, 11, dtype="uint32").tokens.tolist() == FLAT
    path.write_bytes(struct.pack("<8H", *FLAT[:8]))
    with pytest.raises(DataError, match="outside the vocabulary"):
        read_nanogpt(path, 11, dtype="uint32")
    with pytest.raises(DataError, match="holds 'uint16' or 'uint32'"):
        read_nanogpt(path, 11, dtype="int8")


def test_megatron_sentences_join_and_empty_documents_vanish(tmp_path: Path) -> None:
    megatron(tmp_path, "H")
    index = (tmp_path / "x.idx").read_bytes()
    borders = struct.pack("<4q", 0, 2, 2, 3)
    (tmp_path / "x.idx").write_bytes(index[:-32] + borders)
    assert np.diff(read_megatron(tmp_path / "x", 11).offsets).tolist() == [5, 4]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_of_an_index(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Flip, insert or remove bytes: read as before, or a DataError; nothing else."""
    folder = tmp_path_factory.getbasetemp()
    name = data.draw(st.sampled_from(["megatron", "datatrove"]))
    make, read, _ = FORMATS[name]
    make(folder, "H")
    file = folder / ("x.idx" if name == "megatron" else "x.ds.index")
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=2))
    file.write_bytes(raw)
    try:
        store = read(make_path(folder, name), 11)
    except DataError:
        return
    assert store.offsets[0] == 0 and store.offsets[-1] == 9 and (np.diff(store.offsets) > 0).all()

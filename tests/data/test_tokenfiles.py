"""Token files of other projects as sources: recognised, split into documents, checked, and copied token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longctx.data.build import TokenBuild, build_tokens
from longctx.data.sources.readers import write_datatrove, write_megatron, write_nanogpt
from longctx.data.sources.tokenfiles import token_format
from longctx.data.tokenizers.tokenizer import ByteTokenizer
from longctx.data.tokens.file import TokenFile, TokenStore
from longctx.errors import DataError

Make = Callable[..., TokenFile]
WRITERS: dict[str, tuple[str, Callable[[TokenStore, Path], None]]] = {
    "Megatron": ("x.bin", write_megatron),
    "datatrove": ("x.ds", write_datatrove),
    "nanoGPT": ("x.bin", write_nanogpt),
}


@pytest.fixture
def store(make_tokens: Make, tmp_path: Path) -> TokenFile:
    """Documents of bytes, each of which ends with the end-of-document token 256."""
    file = make_tokens([40, 3, 700_000, 1 + 256, 90], 256)
    ids = np.array(file.tokens, np.uint16)
    ids[file.offsets[1:] - 1] = 256
    return TokenStore(file.path, file._stream, ids, file.offsets, 257, "x", end_of_document=256)  # type: ignore[return-value]


def documents(built: TokenBuild) -> list[list[int]]:
    found = []
    for path in filter(None, (built.train, built.held_out)):
        with TokenFile(path, tokenizer_hash=built.tokenizer_hash) as file:
            file.verify()
            found += [file.document(number).tolist() for number in range(file.document_count)]
    return sorted(found)


@pytest.mark.parametrize("name", WRITERS)
def test_documents_are_copied_token_by_token(store: TokenFile, tmp_path: Path, name: str) -> None:
    file, write = WRITERS[name]
    folder = tmp_path / "theirs"
    folder.mkdir()
    write(store, folder / file)
    expected = sorted(store.document(number).tolist() for number in range(store.document_count))
    assert token_format(folder / file) == name
    built = build_tokens(folder / file, "bytes", tmp_path / "out", held_out=0.2)
    assert documents(built) == expected and built.report["formats"] == {f"{name} tokens": 1}
    assert documents(build_tokens(folder, "bytes", tmp_path / "all", format="tokens")) == expected
    if name == "Megatron":
        assert documents(build_tokens(folder / "x", "bytes", tmp_path / "stem")) == expected
        assert documents(build_tokens(folder / "x.idx", "bytes", tmp_path / "index")) == expected
    words = "x.bin holds no text" if name == "nanoGPT" else "holds tokens; give the tokenizer that made them"
    with pytest.raises(DataError, match=words):
        build_tokens(folder / file, "bpe", tmp_path / "out")


def test_a_document_without_its_end_stays_so(make_tokens: Make, tmp_path: Path) -> None:
    write_megatron(make_tokens([5, 9], 200), tmp_path / "x")
    assert documents(build_tokens(tmp_path / "x.bin", "bytes", tmp_path / "out", held_out=0)) == [
        list(range(5)),
        list(range(5, 14)),
    ]


def test_raw_tokens_are_told_by_their_end_or_by_the_user(make_tokens: Make, tmp_path: Path) -> None:
    write_nanogpt(make_tokens([5000], 200), tmp_path / "x.bin")
    with pytest.raises(
        DataError, match=r"may be a nanoGPT file of 5,000 tokens, but data.tokenizer's token 256 .*tokens"
    ):
        build_tokens(tmp_path / "x.bin", "bytes", tmp_path / "out")
    built = build_tokens(tmp_path / "x.bin", "bytes", tmp_path / "out", format="tokens", held_out=0.1)
    assert built.held_out is not None and [len(document) for document in documents(built)] == [4500, 500]


def test_wide_tokens_are_recognised(store: TokenFile, tmp_path: Path) -> None:
    np.asarray(store.tokens, "<u4").tofile(tmp_path / "x.bin")
    built = build_tokens(tmp_path / "x.bin", "bytes", tmp_path / "out", held_out=0)
    assert sum(map(len, documents(built))) == store.token_count


def test_what_is_no_token_file(store: TokenFile, tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_text("some text, of even size!")
    assert build_tokens(tmp_path / "t.bin", "bytes", tmp_path / "out", held_out=0).report["formats"] == {"text": 1}
    (tmp_path / "z.bin").write_bytes(b"PK\x03\x04" + bytes(range(256)))
    with pytest.raises(DataError, match="z.bin: offset 0: this is a ZIP archive"):
        build_tokens(tmp_path / "z.bin", "bytes", tmp_path / "out")
    np.array([1, 2, 300, 256], "<u2").tofile(tmp_path / "w.bin")
    with pytest.raises(DataError, match="w.bin: token 2 .* is 300, outside the vocabulary of 257"):
        build_tokens(tmp_path / "w.bin", ByteTokenizer(), tmp_path / "out")
    write_datatrove(store, tmp_path / "y.ds")
    (tmp_path / "y.ds").write_bytes((tmp_path / "y.ds").read_bytes()[:-2])
    assert token_format(tmp_path / "y.ds") is None
    with pytest.raises(DataError, match=r"y.ds: no token file of Megatron"):
        build_tokens(tmp_path / "y.ds", "bytes", tmp_path / "out", format="tokens")

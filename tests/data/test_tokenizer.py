"""Tokenizers: exact round trips, stable names, transformers reads what we save, and the fast path changes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.tokenizers.tokenizer import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    LibraryTokenizer,
    byte_alphabet,
    load_tokenizer,
    train_bpe,
)
from longctx.errors import DataError, MissingPackageError

TEXT = st.text(
    st.one_of(st.sampled_from(" \n\t\r'sdlvemt09aZ_-\u00a0\u0085\u2028\x1c\x1f"), st.characters(codec="utf-8"))
)


def test_training_is_deterministic(bpe: LibraryTokenizer, sample: list[str]) -> None:
    assert bpe.vocabulary_size == 1500 and bpe.end_of_document == 0
    assert train_bpe((text[:20_000] for text in sample[:60]), 1500).hash == bpe.hash
    assert train_bpe((text[:20_000] for text in sample[:60]), 1499).hash != bpe.hash


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_any_text_comes_back(bpe: LibraryTokenizer, text: str) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32 and tokenizer.decode(ids) == text
        assert tokenizer.end_of_document not in ids


def test_text_cannot_end_a_document(bpe: LibraryTokenizer) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        text = f"a{END_OF_DOCUMENT}b"
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_document not in ids and tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text


def test_bytes_are_their_own_ids() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aß").tolist() == [97, 0xC3, 0x9F] and tokenizer.vocabulary_size == 257
    assert len(set(byte_alphabet())) == 256


def test_byte_fallback_needs_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    with pytest.raises(MissingPackageError, match="or use the tokenizer 'bytes'"):
        train_bpe(["a"], 300)


@pytest.mark.parametrize("which", ["bpe", "bytes"])
def test_transformers_loads_what_we_save(bpe: LibraryTokenizer, tmp_path: Path, which: str) -> None:
    from transformers import AutoTokenizer

    ours = bpe if which == "bpe" else ByteTokenizer()
    ours.save(tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in ("def f(x):\n    return x + 1\n", "  zwei – ß\n\n\n  ", "日本語 text"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text).tolist() and theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.end_of_document and len(theirs) == ours.vocabulary_size
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = load_tokenizer(tmp_path / folder)
        assert (again.hash, again.vocabulary_size) == (ours.hash, ours.vocabulary_size)


def test_other_kinds_of_tokenizer_load(tmp_path: Path) -> None:
    """A word-level tokenizer with a normaliser, truncation and a template: ids without any of the extras."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "[SEP]": 9}, "[UNK]"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 9)])
    backend.enable_truncation(1)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("A b C").tolist() == [1, 2, 0]
    assert (tokenizer.vocabulary_size, tokenizer.end_of_document) == (10, 9)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"__type": "AddedToken", "content": "b"}}))
    assert load_tokenizer(tmp_path / "tokenizer.json").end_of_document == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model": 5}', '{"model": {"vocab": {}}, "added_tokens": 3}']
)
def test_damaged_files_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no tokenizer there"):
        load_tokenizer(tmp_path / "none")


def test_vocabulary_out_of_range() -> None:
    for size in (256, 2**20 + 1):
        with pytest.raises(DataError, match="a byte-level BPE has 257 to"):
            train_bpe(["a"], size)

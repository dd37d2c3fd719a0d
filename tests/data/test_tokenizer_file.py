"""A tokenizer.json is bounded before anything is built from it, and its size is known without the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.data.tokenizers.file import (
    endless,
    read_tokenizer_file,
    tokenizer_file,
    vocabulary_size_in,
    vocabulary_size_of,
)
from longctx.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from longctx.errors import DataError

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    GPT4,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"(?=(\d{3})+(?!\d))",
    r"[\p{Han}]+|[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}&&[^\p{Han}]]+",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"(?i)a+(b|c)*",
]
BOMBS = [
    r"(a+)+$", r"((a*)b?)*", r"(?:\w+\s?)+!", r"([a-z]+)*", r"(x|(y+z?)){2,}", "((((a{100}){100}){100}){100})",
    "(" * 3 + "a+" + ")+" * 3, r"(?:[^]]+\]?)*", "a" * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("pattern", KNOWN)
def test_expressions_of_well_known_tokenizers_pass(pattern: str) -> None:
    assert endless(pattern) is None


@pytest.mark.parametrize("pattern", BOMBS)
def test_expressions_that_may_not_end_are_refused(pattern: str, tmp_path: Path) -> None:
    assert endless(pattern)
    nested = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}}]}
    path = written(tmp_path, pre_tokenizer=nested)
    for read in (read_tokenizer_file, load_tokenizer):
        with pytest.raises(DataError, match="regular expression"):
            read(path)


def written(folder: Path, **changes: Any) -> Path:
    train_bpe(["some text, some words"], 300).save(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize("index", [2**31, 2**24, -1, 2**70])
def test_ids_that_no_vocabulary_has_are_refused(index: int, tmp_path: Path) -> None:
    added = {"id": index, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False}
    path = written(tmp_path, added_tokens=[{**added, "normalized": False, "special": True}])
    for read in (read_tokenizer_file, load_tokenizer):
        with pytest.raises(DataError, match="id"):
            read(path)
    content = json.loads(path.read_text()) | {"added_tokens": []}
    content["model"]["vocab"]["a"] = index
    path.write_text(json.dumps(content))
    for read in (read_tokenizer_file, load_tokenizer):
        with pytest.raises(DataError, match="id"):
            read(path)


def test_the_size_is_the_loaded_tokenizers(tmp_path: Path) -> None:
    for name, tokenizer in {"bpe": train_bpe(["some text, some words"], 300), "bytes": ByteTokenizer()}.items():
        tokenizer.save(tmp_path / name)
        assert vocabulary_size_of(read_tokenizer_file(tmp_path / name / "tokenizer.json")) == tokenizer.vocabulary_size


def test_other_formats_are_named_with_the_way_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    for source in (tmp_path, tmp_path / "tokenizer.model"):
        for read in (tokenizer_file, load_tokenizer):
            with pytest.raises(DataError, match=r"holds tokenizer.model, but no .*convert it.*save_pretrained"):
                read(source)
    with pytest.raises(DataError, match="no tokenizer there"):
        tokenizer_file(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        ("[]", "not a tokenizer.json"), ("{", "not a tokenizer.json"), ("[" * 100_000, "not a tokenizer.json"),
        ('{"model": {"vocab": {"a": "b"}}}', "not a tokenizer.json"), ('{"model": {}}', "not a tokenizer.json"),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    for read in (read_tokenizer_file, load_tokenizer):
        with pytest.raises(DataError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, 0),
        ({"eos_token": "<|endoftext|>"}, 0),
        ({"eos_token": "<new>"}, 1),
        ({"eos_token": "<new>", "pad_token": {"__type": "AddedToken", "content": "<new>"}, "bos_token": "<other>"}, 2),
        ({"added_tokens_decoder": {"SIZE": {"content": "<x>", "special": True}}, "pad_token": "<x>"}, 1),
    ],
)
def test_tokens_that_tokenizer_config_adds_are_counted(tmp_path: Path, settings: dict[str, Any], more: int) -> None:
    path = written(tmp_path)
    content = read_tokenizer_file(path)
    size = vocabulary_size_of(content)
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}).replace("SIZE", str(size))
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert vocabulary_size_in(tmp_path, content) == size + more == load_tokenizer(tmp_path).vocabulary_size


@pytest.mark.parametrize("index", ["2147483648", "-1", "many"])
def test_ids_that_tokenizer_config_adds_are_bounded(tmp_path: Path, index: str) -> None:
    path = written(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {index: {"content": "<x>"}}}))
    for read in (read_tokenizer_file, load_tokenizer):
        with pytest.raises(DataError, match="tokenizer_config.json"):
            read(path)

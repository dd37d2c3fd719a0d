"""Special tokens: those that a tokenizer puts around a text, and those that a text spells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizer_folders import write_tokenizer

from longctx.data.build import build_tokens
from longctx.data.tokenizers.special import SpecialStrings, note, surround
from longctx.data.tokenizers.tokenizer import ByteTokenizer
from longctx.data.tokens.file import TokenFile
from longctx.errors import DataError


def documents(path: Path) -> list[list[int]]:
    with TokenFile(path) as file:
        return [file.document(number).tolist() for number in range(file.document_count)]


def test_strings_are_found_longest_first() -> None:
    named = [("<s>", True), ("<s>x", True), ("plain", False)]
    found = SpecialStrings({"added_tokens": [{"content": name, "special": special} for name, special in named]})
    assert found.split("a<s>xb<s>plain") == ["a", "<s>x", "b", "<s>", "plain"] and found.count("<s>xx<s>") == 2
    assert found.inside("a<s>") and not found.inside("plain <s") and SpecialStrings({}).split("<s>") == ["<s>"]


@pytest.mark.parametrize(
    ("ids", "made"), [([5], [1, 5, 2]), ([1, 5], [1, 5, 2]), ([5, 2], [1, 5, 2]), ([1, 5, 2], [1, 5, 2])]
)
def test_nothing_is_doubled(ids: list[int], made: list[int]) -> None:
    assert surround(np.array(ids, np.uint32), (1,), (2,)).tolist() == made
    assert surround(np.array(ids, np.uint32), (), ()).tolist() == ids


@pytest.mark.parametrize("family", ["llama3", "gemma", "qwen3"])
def test_documents_begin_as_the_tokenizer_begins_texts(tmp_path: Path, family: str) -> None:
    """BOS where the tokenizer adds one, EOS at every end, and neither twice."""
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path / "tokenizer", family)
    theirs = AutoTokenizer.from_pretrained(folder)
    text = tmp_path / "text"
    text.mkdir()
    texts = ["It was a day", f"{theirs.bos_token or ''}cold in April{theirs.eos_token}"]
    for number, content in enumerate(texts):
        (text / f"{number}.txt").write_text(content)
    built = build_tokens(text, folder, tmp_path / "out", held_out=0, special_tokens="parse")
    eos = theirs.eos_token_id
    expected = [[*theirs(texts[0])["input_ids"], eos], theirs(texts[1], add_special_tokens=False)["input_ids"]]
    assert sorted(documents(built.train)) == sorted(expected)
    assert expected[1].count(eos) == 1 and built.report["special_strings"] == (1 if family == "qwen3" else 2)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "llama3"])
def test_strings_in_documents_are_spelled_or_parsed(tmp_path: Path, tokenizer: str) -> None:
    """Spelled out unless asked, counted either way, and a build with the other choice is another build."""
    source = tmp_path / "text.txt"
    source.write_text("one <|endoftext|> two <|endoftext|> three\n" * 40)
    given = write_tokenizer(tmp_path / "tokenizer", tokenizer) if tokenizer == "llama3" else tokenizer
    made = {}
    for special in ("spell", "parse"):
        built = build_tokens(source, given, tmp_path / "out", vocabulary_size=300, held_out=0, special_tokens=special)
        assert built.report["special_strings"] == 80 and not built.reused
        made[special] = documents(built.train)[0]
        from longctx.data.tokenizers.tokenizer import load_tokenizer

        loaded = load_tokenizer(built.tokenizer)
        name = "<|endoftext|>"
        special_id = next(token["id"] for token in loaded.json["added_tokens"] if token["content"] == name)
        body = made[special][:-1]
        assert body.count(special_id) == (80 if special == "parse" else 0)
        assert (name in loaded.decode(body)) is (special == "spell")
    assert len(made["parse"]) < len(made["spell"])
    assert "spell" in str(note({"special_strings": 80}, "spell")) and note({}, "spell") is None
    with pytest.raises(DataError, match="choose one of spell, parse"):
        build_tokens(source, given, tmp_path / "out", special_tokens="drop")  # type: ignore[arg-type]


def test_a_tokenizer_without_any_separator_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("one two\n" * 9)
    folder = write_tokenizer(tmp_path / "tokenizer", "qwen3", eos_token=None, tokenizer_class="PreTrainedTokenizerFast")
    raw = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(raw.replace("<|endoftext|>", "<|nothing|>"))
    settings = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(settings.replace("<|endoftext|>", "<|nothing|>"))
    with pytest.raises(DataError, match="names no eos_token.*tokenizer_config.json"):
        build_tokens(source, folder, tmp_path / "out")


def test_bytes_parse_their_one_special_token() -> None:
    ids = ByteTokenizer().prompt("a<|endoftext|>b").tolist()
    assert ids == [97, 256, 98]

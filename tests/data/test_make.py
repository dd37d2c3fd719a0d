"""Builds of conversations: labels reach the loader, settings decide what is rebuilt, and counts are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_folders import make_tokenizer

from longctx.data.build import TokenBuild, build_tokens
from longctx.data.loader import ShardedLoader
from longctx.data.tokenizers.tokenizer import load_tokenizer
from longctx.data.tokens.file import TokenFile
from longctx.errors import DataError

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = make_tokenizer("qwen3")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = TEMPLATE
    made.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Texts, pairs and conversations in one file, one of them without an answer."""
    rows: list[dict[str, Any]] = []
    for number in range(12):
        talk = [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": f"say {number}"}]
        rows += [{"text": f"text {number}"}, {"messages": talk}]
        rows += [{"prompt": f"begin {number}", "completion": f" end {number}"}]
    rows += [{"messages": [{"role": "user", "content": "hello?"}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


def read(built: TokenBuild) -> list[tuple[str, str]]:
    """Every document of the training file: all of it, and what is counted."""
    words = load_tokenizer(built.tokenizer).transformers
    with TokenFile(built.train, tokenizer_hash=built.tokenizer_hash) as file:
        file.verify()
        found = []
        for number in range(file.document_count):
            places = np.arange(file.offsets[number], file.offsets[number + 1])
            counted = file.tokens[places[~file.is_ignored(places)]]
            found.append((words.decode(file.document(number)), words.decode(counted)))
        return found


def test_each_kind_has_its_labels(mixed: Path, tokenizer: Path, tmp_path: Path) -> None:
    built = build_tokens(mixed, tokenizer, tmp_path / "out", held_out=0)
    documents = read(built)
    said = "<|im_start|>assistant say 0<|im_end|>"  # its role too: no generation prompt gives it
    assert documents[:3] == [
        ("text 0<|endoftext|>", "text 0<|endoftext|>"),
        (f"<|im_start|>user ask 0<|im_end|>{said}", said),
        ("begin 0 end 0<|endoftext|>", " end 0<|endoftext|>"),
    ]  # fmt: skip
    report = built.report
    assert (len(documents), report["documents"], report["conversations"], report["without_labels"]) == (36, 37, 24, 1)
    with TokenFile(built.train) as file:
        assert report["ignored_tokens"] == file.ignored_tokens
    window = next(ShardedLoader(built.train, 600, packing="concat", prefetch=0))[0]
    counted = int((window["labels"] >= 0).sum())
    assert counted == report["tokens"] - 36 - report["ignored_tokens"] + 24  # the first token of each is no label


def test_loss_and_template_are_part_of_the_build(mixed: Path, tokenizer: Path, tmp_path: Path) -> None:
    def build(source: Path = mixed, **settings: Any) -> TokenBuild:
        return build_tokens(source, tokenizer, tmp_path / "out", **settings)

    first = build()
    assert build().reused and not build(loss="all").reused
    assert "ignored_tokens" in build(loss="all").report and build(loss="all").report["ignored_tokens"] == 0
    with pytest.raises(DataError, match=r"data.sources: .*\(data.loss was assistant, now completion\)"):
        build(loss="completion", continues=first.record)
    assert not build().reused
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE + "{# changed #}")
    with pytest.raises(DataError, match="the chat template of data.tokenizer was"):
        build(continues=first.record)
    assert not build().reused
    (tmp_path / "prose.txt").write_text("line\n" * 100)
    build(tmp_path / "prose.txt")
    assert build(tmp_path / "prose.txt", loss="all").reused  # of texts every token counts


def test_what_a_build_lacks_is_named(mixed: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.tokenizer bpe: 13 of the documents are conversations"):
        build_tokens(mixed, "bpe", tmp_path / "out", vocabulary_size=300)
    with pytest.raises(DataError, match="rows.jsonl:2 is a conversation, but data.tokenizer .* has no chat template"):
        build_tokens(mixed, "bytes", tmp_path / "out")
    with pytest.raises(DataError, match="loss 'most': choose one of all, completion, assistant"):
        build_tokens(mixed, tokenizer, tmp_path / "out", loss="most")  # type: ignore[arg-type]
    (tmp_path / "one.jsonl").write_text(mixed.read_text().splitlines()[1])
    built = build_tokens(tmp_path / "one.jsonl", tokenizer, tmp_path / "out")
    assert built.held_out is None and len(read(built)) == 1  # a single conversation is not split
    (tmp_path / "pairs.jsonl").write_text("\n".join(mixed.read_text().splitlines()[2::3]))
    assert build_tokens(tmp_path / "pairs.jsonl", "bpe", tmp_path / "pairs", vocabulary_size=300).report["tokens"]

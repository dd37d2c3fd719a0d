"""Conversations: ids are transformers' own for the whole of it, labels those of an independent search for the turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_folders import FAMILIES, make_tokenizer

from longctx.data.sources.records import conversation_of
from longctx.data.tokenizers.chat import ChatEncoder, Encoded, template_hash
from longctx.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from longctx.errors import DataError

MARKED = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ (m['content'] or '') + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
WORDS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
LAST_ONLY = "{% for m in messages %}{{ m['role'] }}{% if loop.last %}{{ m['content'] }}{% endif %};{% endfor %}"
STRICT = "{% for m in messages %}{% if loop.index0 % 2 != (m['role'] == 'assistant') %}{{ raise_exception('turns must alternate') }}{% endif %}{% endfor %}x"  # noqa: E501
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What time is it?  "},
    {"role": "assistant", "content": "  Thirteen,\n\nas the clocks struck. "},
    {"role": "user", "content": "größer 語?"},
    {"role": "assistant", "content": "def f(x):\n  return 語\n"},
    {"role": "user", "content": "Thanks."},
]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """Write a tokenizer folder of each family, with a given chat template."""

    def make(template: str, family: str = request.param) -> Path:
        made = make_tokenizer(family)
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        made.chat_template = template
        made.save_pretrained(tmp_path / "tokenizer")
        return tmp_path / "tokenizer"

    return make


def encode(folder: Path, record: dict[str, Any], loss: Any = "assistant", parse: bool = False) -> Encoded:
    kind, text = conversation_of(record, "x:1")
    return ChatEncoder(load_tokenizer(folder), loss, parse).encode(text, kind, "x:1")


def common(one: list[int], two: list[int]) -> int:
    """Number of first ids that are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def searched(theirs: Any, messages: list[dict[str, Any]], turns: list[int], tools: Any = None) -> list[bool]:
    """Labels by comparing ids: those after the prompt of a turn, up to where the next message begins."""

    def ids(first: int, ask: bool) -> list[int]:
        if not first:
            return []
        found = theirs.apply_chat_template(messages[:first], tools=tools, add_generation_prompt=ask, return_dict=True)
        return list(found["input_ids"])

    whole = ids(len(messages), False)
    labels = [False] * len(whole)
    for turn in turns:
        for place in range(common(ids(turn, True), whole), common(ids(turn + 1, False), whole)):
            labels[place] = True
        end = common(ids(turn + 1, False), whole) - 1
        while labels[end] and not theirs.decode(whole[end]).strip():  # the line end after <|im_end|>
            labels[end], end = False, end - 1
    return labels


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_ids_and_marked_turns_are_those_of_transformers(folder: Callable[[str], Path], tools: Any) -> None:
    import transformers

    path = folder(MARKED)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    expected = theirs.apply_chat_template(TALK, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    found = encode(path, {"messages": TALK, "tools": tools and json.dumps(tools)})
    assert found.ids.tolist() == expected["input_ids"] and found.complete and found.labels is not None
    assert found.labels.tolist() == [bool(mask) for mask in expected["assistant_masks"]]
    assert encode(path, {"messages": TALK, "tools": tools}, "all").labels is None


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_turns_are_found_in_a_template_without_marks(folder: Callable[[str], Path], tools: Any) -> None:
    import transformers

    path = folder(PLAIN)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    whole = theirs.apply_chat_template(TALK, tools=tools, return_dict=True)["input_ids"]
    for loss, turns in (("assistant", [2, 4]), ("completion", [4])):
        found = encode(path, {"messages": TALK, "tools": tools}, loss)
        assert found.ids.tolist() == whole and found.labels is not None
        assert found.labels.tolist() == searched(theirs, TALK, turns, tools)
    marked = encode(folder(MARKED), {"messages": TALK, "tools": tools})
    assert marked.labels is not None and found.labels.sum() < marked.labels.sum()
    assert encode(folder(PLAIN), {"messages": TALK, "tools": tools}).labels.tolist() == marked.labels.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("folder", ["llama3", "qwen3", "gpt2"], indirect=True)  # these have a token for any character
def test_a_template_without_special_tokens(folder: Callable[[str], Path]) -> None:
    """The line end is what ends a turn, so it is a label, and a turn begins with its role, which nothing asks for."""
    path = folder(WORDS)
    found = encode(path, {"messages": TALK})
    assert found.labels is not None
    read = [load_tokenizer(path).decode(found.ids[found.labels == which]) for which in (True, False)]
    assert "clocks struck" in read[0] and "return" in read[0] and "Thanks" not in read[0] and "assistant" in read[0]
    assert "Be brief" in read[1] and "clocks" not in read[1]


def test_prompt_and_completion_as_trl_masks_them(folder: Callable[[str], Path]) -> None:
    import transformers

    path = folder(PLAIN)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    asked = theirs.apply_chat_template(TALK[:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    found = encode(path, {"prompt": TALK[:4], "completion": TALK[4:]}, "completion")
    begin = common(asked, found.ids.tolist())
    assert found.labels is not None and found.labels.tolist() == [n >= begin for n in range(found.ids.size)]
    turns = encode(path, {"prompt": TALK[:4], "completion": TALK[4:]}, "assistant").labels
    assert turns is not None and turns.tolist() == searched(theirs, TALK, [2, 4])

    for prompt, completion in (("What time is it?", " Thirteen."), ("def f(x):\n ", " return x\n"), ("", "a b")):
        found = encode(path, {"prompt": prompt, "completion": completion})
        ids = load_tokenizer(path).document(load_tokenizer(path).encode(prompt + completion)).tolist()
        begin = common(theirs(prompt)["input_ids"], theirs(prompt + completion)["input_ids"])
        assert found.ids.tolist() == ids and not found.complete and found.labels is not None
        assert found.labels.tolist() == [n >= begin for n in range(len(ids))]
        assert encode(path, {"prompt": prompt, "completion": completion}, "all").labels is None


def test_an_answer_that_was_begun_is_continued(folder: Callable[[str], Path]) -> None:
    prompt = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]
    path = folder(
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% if not loop.last %};{% endif %}{% endfor %}"
    )
    rest = [{"role": "user", "content": "three."}]
    found = encode(path, {"prompt": prompt, "completion": rest}, "completion")
    assert found.labels is not None and "two" not in load_tokenizer(path).decode(found.ids[found.labels])


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_what_cannot_be_done_is_named(folder: Callable[[str], Path]) -> None:
    talk = {"messages": TALK}
    with pytest.raises(DataError, match=r"x:1: data.loss assistant: .*first 2 messages differently.*data.loss: all"):
        encode(folder(LAST_ONLY), talk)
    assert encode(folder(LAST_ONLY), talk, "all").labels is None
    with pytest.raises(DataError, match="x:1: the chat template of data.tokenizer rejects.*turns must alternate"):
        encode(folder(STRICT), talk)
    hostile = {"messages": [{"role": "user", "content": "Stop<|im_end|>"}, {"role": "assistant", "content": "No."}]}
    with pytest.raises(DataError, match=r"a message holds '<\|im_end\|>'.*data.special_tokens: parse"):
        encode(folder(PLAIN), hostile)
    assert encode(folder(PLAIN), hostile, parse=True).ids.size > 10
    kind, text = conversation_of(talk, "x:1")
    with pytest.raises(
        DataError, match="x:1 is a conversation, but data.tokenizer 'without a folder' has no chat temp"
    ):
        ChatEncoder(ByteTokenizer()).encode(text, kind, "x:1")
    assert template_hash(ByteTokenizer()) is None
    assert template_hash(load_tokenizer(folder(PLAIN))) != template_hash(load_tokenizer(folder(MARKED)))
    assert np.array_equal(encode(folder(PLAIN), talk).ids, encode(folder(MARKED), talk).ids)

"""Records of every usual shape become one JSON text; what they lack is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.data.sources.document import CHAT, PAIR, TEXT
from longctx.data.sources.records import conversation_of, is_conversation, without_nulls
from longctx.data.sources.text import open_source
from longctx.errors import DataError

ASK, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
SHARED = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
TOOLS = [{"type": "function", "function": {"name": "clock"}}]
SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"messages": [ASK, ANSWER]}, {"messages": [ASK, ANSWER]}),
    ({"conversations": SHARED}, {"messages": [ASK, ANSWER]}),
    ({"messages": None, "conversations": [ASK, ANSWER]}, {"messages": [ASK, ANSWER]}),
    ({"conversations": SHARED, "system": "Hm."}, {"messages": [{"role": "system", "content": "Hm."}, ASK, ANSWER]}),
    ({"prompt": [ASK], "completion": [ANSWER], "id": 3}, {"messages": [ASK, ANSWER], "prompt": 1}),
    ({"messages": [ASK], "tools": json.dumps(TOOLS)}, {"messages": [ASK], "tools": TOOLS}),
    ({"messages": [ASK], "tools": [], "chat_template_kwargs": {"thinking": False}},
     {"messages": [ASK], "options": {"thinking": False}}),
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), SAME)
def test_shapes_of_conversations(record: dict[str, Any], expected: dict[str, Any]) -> None:
    assert is_conversation(record)
    kind, text = conversation_of(record, "here")
    assert kind == CHAT and json.loads(text) == expected


def test_two_texts_are_a_pair() -> None:
    kind, text = conversation_of({"prompt": "größer ", "completion": "語", "id": 3}, "here")
    assert kind == PAIR and text == '{"prompt":"größer ","completion":"語"}'
    assert not is_conversation({"prompt": "a"}) and not is_conversation({"text": "a"})


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": "hello"}, "here: messages is text, not a list of messages"),
        ({"messages": []}, "here: messages is empty"),
        ({"messages": [ASK, 5]}, r"messages\[1\] is a number, not an object with role and content"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role \(found: 'content'\)"),
        ({"messages": [{"role": "user", "content": {}}]}, r"messages\[0\]: content is an object, not text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from is 'alien'; use one of human, user"),
        ({"prompt": "x", "completion": [ANSWER]}, "prompt is text and completion is an array; give two texts, or two"),
        ({"prompt": None, "completion": "x"}, "prompt is null"),
        ({"messages": [ASK], "tools": "[{"}, "tools is text that is not JSON"),
        ({"messages": [ASK], "tools": '"x"'}, "tools is text, not an array"),
        ({"messages": [ASK], "chat_template_kwargs": [1]}, "chat_template_kwargs is an array, not an object"),
    ],
)
def test_what_is_wrong_is_named(record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        conversation_of(record, "here")


def test_nulls_of_columns_are_no_keys() -> None:
    row = {"role": "assistant", "content": None, "tool_calls": [{"id": None, "name": "x"}], "name": None}
    assert without_nulls(row) == {"role": "assistant", "content": None, "tool_calls": [{"name": "x"}]}


LINES = [
    {"text": "prose", "messages": [ASK, ANSWER]},
    {"messages": [ASK, ANSWER]},
    {"prompt": "a", "completion": "b"},
]


@pytest.mark.parametrize("write", [lambda rows: "\n".join(map(json.dumps, rows)), lambda rows: json.dumps(rows)])
def test_files_of_mixed_records(tmp_path: Path, write: Any) -> None:
    (tmp_path / "x.json").write_text(write(LINES))
    kinds = [document.kind for document in open_source(tmp_path).documents() if document.text]
    assert kinds == [TEXT, CHAT, PAIR]
    assert [d.kind for d in open_source(tmp_path, format="chat").documents() if d.text] == [CHAT, CHAT, PAIR]
    (tmp_path / "x.json").write_text('{"text": "prose"}')
    with pytest.raises(DataError, match=r"object 1 .byte 0.: no messages, and no prompt.*data.format: auto|x.json:1"):
        list(open_source(tmp_path, format="chat").documents())
    with pytest.raises(DataError, match="format 'talk': choose one of auto, text, chat"):
        open_source(tmp_path, format="talk")


def test_a_long_conversation_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longctx.data.sources import jsontext

    monkeypatch.setattr(jsontext, "_LARGE", 40)
    monkeypatch.setattr(jsontext, "_LONG_STRING", 20)
    long = [{"role": "user", "content": "word " * 50 + '"\\ud83d'}, ANSWER]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": long}))
    (document,) = open_source(tmp_path / "x.jsonl").documents()
    assert json.loads(document.text) == {"messages": long}


def test_tables_hold_pairs(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('id,prompt,completion\n1,a,"b, c"\n2,d,e\n')
    found = [(d.kind, json.loads(d.text)) for d in open_source(tmp_path / "x.csv").documents()]
    assert found == [(PAIR, {"prompt": "a", "completion": "b, c"}), (PAIR, {"prompt": "d", "completion": "e"})]

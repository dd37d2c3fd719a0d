"""Text from Hugging Face datasets, through a stand-in for the package `datasets`."""

from __future__ import annotations

import json
import sys
import types

import pytest

from longctx.data.sources.text import open_source
from longctx.errors import DataError, MissingPackageError


def test_datasets_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'longctx\[data\]'"):
        list(open_source("hf:some/name").documents())


def test_datasets_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for `datasets`: what we ask of it is load_dataset(name, config, split=…) and rows as dicts."""
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, object]]:
        assert not streaming
        asked.append((name, config, split))
        if split == "none":
            raise ValueError("no such split")
        return [{"text": "a"}, {"text": "b" if split == "train" else None}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert [document.text for document in open_source("hf:x/y").documents()] == ["a", "b"]
    with pytest.raises(DataError, match="row 1: 'text' is null, not text"):
        list(open_source("hf:x/y:en:test").documents())
    with pytest.raises(DataError, match="cannot load split 'none': no such split"):
        list(open_source("hf:x/y:none").documents())
    assert asked == [("x/y", None, "train"), ("x/y", "en", "test"), ("x/y", None, "none")]


def test_rows_may_be_conversations_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "tool_calls": None}]
    asked = []

    def load_dataset(*_: str, **keywords: object) -> list[dict[str, object]]:
        asked.append(keywords)
        return [{"messages": talk, "id": 1}, {"text": "prose"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = [(document.kind, document.text) for document in open_source("hf:x/y", streaming=True).documents()]
    assert found[1] == ("text", "prose") and found[0][0] == "chat"
    assert json.loads(found[0][1]) == {"messages": [talk[0], {"role": "assistant", "content": "Ho"}]}
    assert asked == [{"split": "train", "streaming": True}]


def test_half_a_surrogate_pair_and_a_wrong_column_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "a", "body": "\ud800"}]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: rows))
    with pytest.raises(DataError, match=r"row 0 has no text under 'prose' \(found: text, body\)"):
        list(open_source("hf:x/y", field="prose").documents())
    with pytest.raises(DataError, match="row 0: half of a surrogate pair at character 0"):
        list(open_source("hf:x/y", field="body").documents())

"""Hash a tokenizer by what decides a document's ids; equal after saving with another version of the package."""

from __future__ import annotations

import hashlib
import json
from typing import Any

Frame = tuple[tuple[int, ...], tuple[int, ...]]
"""ids that a tokenizer puts before and after a text"""


def tokenizer_hash(content: dict[str, Any], end_of_document: int | None, frame: Frame = ((), ())) -> str:
    """Return the sha256 (64 hex digits) of what decides a document's ids in a tokenizer.json.

    Left out: decoder, truncation, padding, and defaults that some versions write and others do not.

    Args:
        frame: what the post-processor puts before and after a text.
    """
    model = dict(content["model"])
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.pop("merges", None) or []]
    vocabulary = model.pop("vocab")
    model["type"] = model.get("type") or "BPE"
    added = [[t["id"], t["content"]] for t in content.get("added_tokens") or []]
    named = {
        "model": _essential(model),
        "vocabulary": sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary,
        "merges": merges,
        "added_tokens": sorted(added),
        "normalizer": _essential(content.get("normalizer")),
        "pre_tokenizer": _essential(content.get("pre_tokenizer")),
        "end_of_document": end_of_document,
    }
    if frame != ((), ()):
        named["frame"] = frame
    return hashlib.sha256(json.dumps(named, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _essential(value: Any) -> Any:
    """Drop keys whose value is None, False or empty: only some versions write them."""
    if isinstance(value, dict):
        kept = {key: _essential(inner) for key, inner in value.items() if key != "trim_offsets"}
        return {key: inner for key, inner in kept.items() if inner not in (None, False, "", [], {})}
    if isinstance(value, list):
        return [_essential(inner) for inner in value]
    return value

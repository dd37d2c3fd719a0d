"""The number of positions that a pretrained model supports, and whether a setting can raise it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from longctx.models.load.headers import Weight
from longctx.models.load.settings import text_settings, whole_number
from longctx.models.names import PREFIX

_NAMES = ("max_position_embeddings", "n_positions")
_TABLE = re.compile(r"(?:^|\.)(wpe|embed_positions|position_embeddings?|positions_embed)\.weight$")
# RoBERTa's positions begin after its padding id.
_OFFSET = frozenset(
    {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod"}
)
# RoPE types that take max_position_embeddings as the length of the training data.
_MEANT = frozenset({"dynamic", "yarn", "longrope"})


class Reach(NamedTuple):
    """The supported positions of a model."""

    positions: int
    """longest sequence in tokens"""
    learned: bool
    """positions are rows of a table, which no setting extends"""
    scaling: str | None
    """RoPE type, if raising the number alone would change the rotation"""


def reach_of(settings: dict[str, Any], weights: dict[str, Weight]) -> Reach | None:
    """Return the supported positions of a folder's model; None if unlimited (ALiBi, state-space models).

    Args:
        settings: the content of config.json.
        weights: the result of ``read_weights``; empty if unknown.
    """
    settings = text_settings(settings)
    declared = whole_number(settings, *_NAMES)
    kind = str(settings.get("model_type")).removeprefix(PREFIX)
    tables = [weight.shape[0] for name, weight in weights.items() if _TABLE.search(name) and len(weight.shape) == 2]
    if not tables and (declared is None or settings.get("alibi") is True):
        return None
    known = [*tables, *([] if declared is None else [declared])]
    padding = settings.get("pad_token_id")
    offset = (padding if isinstance(padding, int) else 1) + 1 if kind in _OFFSET else 0
    rope = _kinds_of_rope(settings)
    if declared is not None and "dynamic" in rope and not tables:
        return None  # dynamic RoPE rescales beyond the declared length
    scaling = next((kind for kind in sorted(rope) if kind in _MEANT), None)
    return Reach(min(known) - offset, bool(tables) or "n_positions" in settings, scaling)


def _kinds_of_rope(settings: dict[str, Any]) -> set[str]:
    """Return the RoPE types in config.json, in old or new spelling, of all layer types."""
    found = set()
    for key in ("rope_parameters", "rope_scaling"):
        block = settings.get(key)
        if isinstance(block, dict):
            for part in (block, *(inner for inner in block.values() if isinstance(inner, dict))):
                found.add(part.get("rope_type") or part.get("type"))
    return {kind for kind in found if isinstance(kind, str)}

"""What `model.rope` means for a run: transformers' `rope_parameters` and `max_position_embeddings`, defaults filled in.

Without torch. `rope_rules` says what is wrong with a block; here it is taken as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from longctx.config.schema import RunConfig
from longctx.config.sections.rope import RopeSection
from longctx.models.load.rope import rope_of
from longctx.models.load.settings import read_settings, whole_number

KEYS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
        | {"mscale", "mscale_all_dim", "truncate"}
    ),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}
"""RoPE type -> its keys in transformers, beside rope_theta and partial_rotary_factor"""
COMMON = frozenset({"rope_type", "rope_theta", "partial_rotary_factor"})
_BY_RATIO = ("linear", "yarn", "longrope", "llama3")  # their factor is new positions / original ones by default
_BOUNDED = ("linear", "yarn")  # factor x original positions is the longest row that they are made for


class Rope(NamedTuple):
    """A run's rotary positions."""

    parameters: dict[str, Any]
    """transformers' rope_parameters"""
    positions: int
    """max_position_embeddings"""
    original: int | None
    """positions before the extension; None if not known"""


def resolve(config: RunConfig, settings: dict[str, Any] | None = None) -> Rope | None:
    """Return the rotary positions of `model.rope`; None without it.

    Args:
        settings: the content of the folder's config.json; None reads it, if there is a folder.

    Raises:
        ModelError: the folder's config.json cannot be read.
    """
    rope = config.model.rope
    if rope is None:
        return None
    if settings is None:
        settings = {} if config.model.pretrained is None else read_settings(config.model.pretrained)
    own, before = whole_number(settings, "max_position_embeddings"), rope_of(settings)
    original = rope.original_max_position_embeddings or _original(rope, own, before)
    positions = config.model.max_positions or max(config.data.sequence_length, own or 0)
    if rope.rope_type == "dynamic":  # it scales rows beyond max_position_embeddings
        positions = config.model.max_positions or own or positions
    elif config.model.max_positions is None and rope.rope_type in _BOUNDED and rope.factor and original:
        positions = max(positions, int(rope.factor * original))
    return Rope(_parameters(rope, before, original, positions), positions, original)


def longest_row(rope: RopeSection, found: Rope) -> int | None:
    """Return the longest row that the scaling is made for; None if any is."""
    if rope.rope_type not in _BOUNDED or rope.factor is None or found.original is None:
        return None
    return int(rope.factor * found.original)


def scaled(before: dict[str, Any]) -> str | None:
    """Return the RoPE type of a folder whose positions are scaled already, else None."""
    kind = before.get("rope_type", "default")
    return None if kind == "default" else str(kind)


def _original(rope: RopeSection, own: int | None, before: dict[str, Any]) -> int | None:
    """Return the positions before the extension as far as the folder tells."""
    if scaled(before) is None:
        return own
    kept = before.get("original_max_position_embeddings") if before["rope_type"] == rope.rope_type else None
    return kept if isinstance(kept, int) else None


def _parameters(rope: RopeSection, before: dict[str, Any], original: int | None, positions: int) -> dict[str, Any]:
    kind = rope.rope_type
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in rope if value is not None}
    found: dict[str, Any] = {key: before[key] for key in ("rope_theta", "partial_rotary_factor") if key in before}
    if kind == "llama3":
        found |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if original is not None:
        found["original_max_position_embeddings"] = original
        if kind in _BY_RATIO:
            found["factor"] = max(positions / original, 1.0)
    return {key: value for key, value in (found | given).items() if key in KEYS[kind] | COMMON}

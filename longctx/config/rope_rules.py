"""Rules of `model.rope`: keys of its type, and what they ask of the model and the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longctx.config import architecture
from longctx.config.findings import Finding, Rule
from longctx.config.problems import show
from longctx.config.rope import COMMON, KEYS, longest_row, resolve, scaled
from longctx.config.schema import RunConfig
from longctx.models.load.rope import rope_of
from longctx.models.load.settings import whole_number

_KEY = "model.rope"


def _rotary(config: RunConfig) -> Iterator[Finding]:
    name = config.model.architecture
    if config.model.rope is not None and name is not None and name not in architecture.ROTARY:
        yield Finding(_KEY, f"{name} has no rotary positions; remove the key", "rope")


def _one_source(config: RunConfig) -> Iterator[Finding]:
    if config.model.rope is not None and "rope_parameters" in config.model.extra:
        message = "conflicts with model.rope, which sets them; remove one of the two"
        yield Finding("model.extra.rope_parameters", message, "conflict")


def _keys_of_the_type(config: RunConfig) -> Iterator[Finding]:
    rope = config.model.rope
    if rope is None:
        return
    kind = rope.rope_type
    for key, value in rope:
        helps = key == "original_max_position_embeddings" and kind == "linear" and rope.factor is None
        if value is not None and key not in KEYS[kind] | COMMON and not helps:
            users = ", ".join(sorted(name for name, keys in KEYS.items() if key in keys))
            message = f"got {show(value)}, which rope_type {kind} does not use (only {users}); remove the key"
            yield Finding(f"{_KEY}.{key}", message, "idle-key")


def _order(config: RunConfig) -> Iterator[Finding]:
    rope = config.model.rope
    if rope is None:
        return
    low, high = rope.low_freq_factor or 1, rope.high_freq_factor or 4
    if rope.rope_type == "llama3" and high <= low:
        message = f"got {high:g}, not above low_freq_factor {low:g}; raise it"
        yield Finding(f"{_KEY}.high_freq_factor", message, "out-of-range")
    fast, slow = rope.beta_fast or 32, rope.beta_slow or 1
    if rope.rope_type == "yarn" and fast <= slow:
        yield Finding(f"{_KEY}.beta_fast", f"got {fast:g}, not above beta_slow {slow:g}; raise it", "out-of-range")


def _from_scratch(config: RunConfig) -> Iterator[Finding]:
    if config.model.pretrained is None and config.model.rope is not None and config.model.architecture is not None:
        size = architecture.head_dim(config.model)
        yield from of_the_model(config, {"head_dim": size} if size else {})


def of_the_model(config: RunConfig, settings: dict[str, Any]) -> Iterator[Finding]:
    """Yield what a model, described by (some of) its config.json, still lacks of a rope block, or has otherwise."""
    rope = config.model.rope
    if rope is None:
        return
    found = resolve(config, settings)
    assert found is not None
    kind, before = rope.rope_type, rope_of(settings)
    for key in ("original_max_position_embeddings", "factor"):
        if key in KEYS[kind] and key not in found.parameters:
            yield Finding(f"{_KEY}.{key}", _missing(key, kind, before), "missing")
            return
    for key in ("short_factor", "long_factor"):
        yield from _factors(key, found.parameters.get(key), kind, settings, found.parameters)
    most, length = longest_row(rope, found), config.data.sequence_length
    if most is not None and length > most and found.original:
        message = (
            f"got {rope.factor:g}, which extends {found.original:,} positions to {most:,}, but rows have {length:,}; "
            f"use {length / found.original:g}, or remove the key"
        )
        yield Finding(f"{_KEY}.factor", message, "length")
    if kind == "dynamic" and length <= found.positions:
        message = (
            f"got 'dynamic', which changes nothing in rows of {length:,} of {found.positions:,} positions; remove it, "
            "or set model.max_positions to the length at which scaling begins"
        )
        yield Finding(f"{_KEY}.rope_type", message, "rope")


def _missing(key: str, kind: str, before: dict[str, Any]) -> str:
    if key == "factor" and kind == "dynamic":
        return "is missing; 1 lets the base grow as the row does"
    if scaled(before) is not None:
        return (
            f"is missing; the folder's {scaled(before)} RoPE is scaled already, so rope_type {kind} cannot tell what "
            "it extends: write it"
        )
    return f"is missing; rope_type {kind} needs it in a model from scratch"


def _factors(
    key: str, value: list[float] | None, kind: str, settings: dict[str, Any], parameters: dict[str, Any]
) -> Iterator[Finding]:
    """The lists of longrope: one positive divisor for each frequency."""
    if kind != "longrope":
        return
    hidden, heads = whole_number(settings, "hidden_size"), whole_number(settings, "num_attention_heads")
    size = whole_number(settings, "head_dim") or (hidden // heads if hidden and heads else None)
    wanted = None if size is None else int(size * parameters.get("partial_rotary_factor", 1.0)) // 2
    each = f"one number for each of the {wanted} frequencies" if wanted else "one number for each frequency"
    if value is None:
        yield Finding(f"{_KEY}.{key}", f"is missing; rope_type longrope needs {each}", "missing")
    elif wanted is not None and len(value) != wanted:
        yield Finding(f"{_KEY}.{key}", f"got {len(value)} numbers; give {each}", "rope")
    elif min(value, default=0) <= 0:
        yield Finding(f"{_KEY}.{key}", f"got {min(value, default=0):g}; each is above 0", "out-of-range")


RULES: tuple[Rule, ...] = (_rotary, _one_source, _keys_of_the_type, _order, _from_scratch)

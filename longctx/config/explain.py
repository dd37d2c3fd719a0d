"""Explain keys: value, where it is set, meaning and accepted values."""

from __future__ import annotations

from typing import NamedTuple

from longctx.config.derived import CPU_RANKS, Derived, derive, world_size
from longctx.config.fields import environment_ok
from longctx.config.keys import Leaf, expected, leaves, nearest, sections
from longctx.config.load import Loaded
from longctx.config.problems import redact
from longctx.config.write import scalar
from longctx.errors import ConfigError


class Row(NamedTuple):
    """One line of an explanation."""

    key: str
    value: str
    source: str
    meaning: str
    expected: str


def explain(loaded: Loaded | None, wanted: list[str], default_world: int = CPU_RANKS) -> list[Row]:
    """Return a row for each wanted key or section (all keys when ``wanted`` is empty).

    Args:
        loaded: a configuration; None shows the schema's defaults.
        wanted: dotted keys, section names, or ``derived``.
        default_world: ranks that this machine starts by default.

    Raises:
        ConfigError: there is no such key.
    """
    rows = [_row(leaf, loaded) for leaf in leaves().values()]
    if loaded is not None:
        rows += _derived_rows(derive(loaded.config, world_size(loaded.config, default_world)))
    if not wanted:
        return rows
    rows += [_inner_row(leaf) for outer in leaves().values() for leaf in outer.inner.values()]
    chosen = []
    for name in wanted:
        found = [row for row in rows if row.key == name or row.key.startswith(f"{name}.")]
        if not found:
            section, _, last = name.rpartition(".")
            near = nearest(section if section in sections() else "", last or name)
            hint = f"did you mean {near[0]!r}?" if near else f"sections: {', '.join(sections())}"
            raise ConfigError(f"explain {name}: there is no such key; {hint}")
        chosen += found
    return chosen


def _row(leaf: Leaf, loaded: Loaded | None) -> Row:
    key, value, source = leaf.key, leaf.default, "required" if leaf.required else "default"
    if loaded is not None:
        value = leaf.value_in(loaded.config)
        source = str(loaded.sources.get(key, "default"))
    shown = "" if loaded is None and leaf.required else redact(scalar(value))
    note = "; ${env:NAME} is read here" if environment_ok(leaf.field) else ""
    return Row(key, shown, source, leaf.meaning, expected(leaf) + note)


def _inner_row(leaf: Leaf) -> Row:
    """Describe a key inside a block; the block's own row shows its value."""
    return Row(leaf.key, "", "required" if leaf.required else "default", leaf.meaning, expected(leaf))


def _derived_rows(derived: Derived) -> list[Row]:
    fields = type(derived).model_fields
    note = "no key: derived from the others"
    return [
        Row(f"derived.{name}", scalar(value), "derived", fields[name].description or "", note)
        for name, value in derived.model_dump().items()
    ]

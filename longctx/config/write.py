"""Write values and configurations as YAML text that the strict reader reads back unchanged."""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

from longctx.config.fields import Section
from longctx.config.keys import Leaf, leaves, sections
from longctx.config.schema import RunConfig
from longctx.config.strict_yaml import parse

_WIDTH = 120
_PLAIN = re.compile(r"[A-Za-z./_][A-Za-z0-9./_-]*", re.ASCII)


def scalar(value: Any) -> str:
    """Return one value on one line: ``null``, ``true``, ``0.001``, ``text``, ``[a, b]``, ``{key: value}``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Section):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(str(key))}: {scalar(item)}" for key, item in value.items()) + "}"
    return value if _PLAIN.fullmatch(value) and isinstance(parse(value, "").value, str) else _quoted(value)


def _quoted(text: str) -> str:
    """Return ``text`` in double quotes, with non-printable characters (such as line separators) escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(
        c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 2**16 else f"\\U{ord(c):08x}" for c in quoted
    )


def dump(config: RunConfig) -> str:
    """Return ``config`` with every key written out, as kept in the run directory."""
    blocks = []
    for name in sections():
        blocks += [f"{name}:"] + [f"  {key}: {scalar(value)}" for key, value in getattr(config, name)]
    return "\n".join([*blocks, f"deepspeed: {scalar(config.deepspeed)}"]) + "\n"


def template(values: dict[str, Any], title: str, *, full: bool = False, reasons: dict[str, str] | None = None) -> str:
    """Return a commented YAML in which ``values`` (dotted key -> value) are set.

    Args:
        values: the keys to set; a valid file needs at least the required ones.
        title: comment lines for the top.
        full: also show every other key, commented out, at its default.
        reasons: comments of keys in place of their meanings; None shows the meanings.
    """

    def comment(leaf: Leaf) -> str:
        return leaf.meaning if reasons is None or leaf.key not in values else reasons.get(leaf.key, "")

    lines = [f"# {line}".rstrip() for line in title.splitlines()]
    for name, kind in sections().items():
        shown = [leaf for leaf in leaves().values() if leaf.path[:-1] == (name,) and (full or leaf.key in values)]
        if shown:
            about = _comment(" ".join((kind.__doc__ or "").split())) if reasons is None else []
            lines += ["", *about, f"{name}:"]
        for leaf in shown:
            lines += [*_comment(comment(leaf), "  "), f"  {_entry(leaf, values)}"]
    block = leaves()["deepspeed"]
    if full or block.key in values:
        lines += ["", *_comment(comment(block)), _entry(block, values)]
    return "\n".join([*lines, ""])


def _entry(leaf: Leaf, values: dict[str, Any]) -> str:
    """Return ``name: value``, commented out with its default where ``values`` does not set the key."""
    given = leaf.key in values
    return f"{'' if given else '# '}{leaf.path[-1]}: {scalar(values[leaf.key] if given else leaf.default)}"


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")

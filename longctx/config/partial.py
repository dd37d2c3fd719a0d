"""What is left of a configuration whose keys are partly wrong, so that rules between the other keys are told as well.

A wrong value is replaced by its default, or by a stand-in where there is none. Whatever a rule then says about such a
key, or in terms of it, is not said to the user: it would be about the stand-in.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from longctx.config.keys import leaves, sections
from longctx.config.rules import Finding
from longctx.config.schema import RunConfig
from longctx.config.strict_yaml import Key

STAND_INS: dict[str, Any] = {
    "data.sources": ["python-stdlib"],
    "data.sequence_length": 4096,
    "train.steps": 2**20,
    "output.folder": "runs",
}
"""Values for keys that have no default."""
_ROUNDS = 4  # a removed key may be required, and a value under it may be wrong too


def partial_config(tree: dict[str, Any]) -> tuple[RunConfig | None, frozenset[str]]:
    """Return (a valid configuration of what is right in ``tree``, the dotted keys that are not the user's).

    Args:
        tree: the YAML as nested dictionaries; left as it is.
    """
    tree, unknown = copy.copy(tree), set[str]()
    for name, block in tree.items():
        tree[name] = copy.copy(block)
    for _ in range(_ROUNDS):
        try:
            return RunConfig.model_validate(tree), frozenset(unknown)
        except ValidationError as error:
            for item in error.errors(include_url=False, include_context=False, include_input=False):
                unknown.add(_mend(tree, item["loc"]))
    return None, frozenset(unknown)


def told_of(findings: Iterable[Finding], unknown: frozenset[str]) -> list[Finding]:
    """Return the findings that are about keys the user has given, not about stand-ins for those in ``unknown``."""
    words = {key.rpartition(".")[2] for key in unknown}
    named = re.compile(r"\b(" + "|".join(map(re.escape, sorted(words))) + r")\b") if words else None
    grid = any(key.startswith(("mesh", "launch")) for key in unknown)
    return [
        finding
        for finding in findings
        if not any(_touches(finding.key, key) for key in unknown)
        and not (named and named.search(finding.message))
        and not (grid and finding.code in ("mesh", "zero-group", "batch", "deepspeed", "length"))
    ]


def _touches(finding: str, key: str) -> bool:
    """Whether a finding's key is an unknown key, lies in one, or is the block around it."""
    return finding == key or finding.startswith(f"{key}.") or key.startswith(f"{finding}.")


def _mend(tree: dict[str, Any], loc: tuple[int | str, ...]) -> str:
    """Replace the value that an error is about; return its dotted key."""
    section = str(loc[0])
    inner = section in sections() and isinstance(tree.get(section), dict) and len(loc) > 1
    if not inner and section in sections():
        tree[section] = {}
        return section
    path: Key = (section, str(loc[1])) if inner else (section,)
    key, name = ".".join(map(str, path)), str(path[-1])
    block = tree[section] if inner else tree
    block.pop(name, None)
    if key in STAND_INS:
        block[name] = STAND_INS[key]
    return key if key in leaves() else section

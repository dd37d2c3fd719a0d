"""Leave wrong and missing keys of a configuration without a value, so that rules between the others still run.

pydantic builds a configuration only if every key is valid. So wrong values are first replaced, by their default or by a
stand-in if there is none; then `without` removes the replaced values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from longctx.config.keys import leaves, sections
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
    """Return (a configuration of the valid values in ``tree``, the dotted keys whose values were replaced).

    Args:
        tree: the YAML as nested dictionaries; not modified.
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


def without(config: RunConfig, unknown: Iterable[str]) -> RunConfig:
    """Return a copy of ``config`` in which reading a key in ``unknown`` raises UnknownValue.

    Args:
        unknown: dotted keys as problems name them: ``train.steps``, ``data.sources[1]``, or a whole section. Keys
            that the schema does not have, and keys inside a raw block, are ignored.
    """
    partial = config.model_copy()
    for name in unknown:
        key = name.partition("[")[0]
        section, _, leaf = key.partition(".")
        if section in sections() and (not leaf or key in leaves()):
            block = getattr(partial, section).model_copy()
            for field in [leaf] if leaf else list(vars(block)):
                vars(block).pop(field, None)
            vars(partial)[section] = block
        elif key in leaves():
            vars(partial).pop(key, None)
    return partial


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

"""Prepare a parsed document for validation: unknown keys, ``${env:NAME}``, and checks of raw blocks.

A misspelt key is reported with the nearest valid one, and its value is then read as if it had been spelt right, so
that one typo gives one message and the rest of the file is still checked.
"""

from __future__ import annotations

import os
import re
from typing import Any

from longctx.config.fields import environment_ok
from longctx.config.keys import Leaf, inner_key, leaves, nearest, sections
from longctx.config.mixture import split_sources
from longctx.config.problems import Location, Problem, show
from longctx.config.schema import RunConfig
from longctx.config.strict_yaml import Key, YamlDocument, show_key

_ENVIRONMENT = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]{0,127})\}")
_SECRET = re.compile(r"(^|_)(api_?key|secret|password|passwd|credentials?|(access|auth|hf|api)_token|token)$", re.I)
_FORBIDDEN = re.compile("[\x00-\x1f\x7f]")


def tidy(document: YamlDocument) -> None:
    """Bring ``document`` into the shape of the schema, in place, and record problems."""
    tree = document.value
    _rename(document, tree, "")
    split_sources(document)
    for name, kind in sections().items():
        if name in tree and tree[name] is None:
            tree[name] = {}
        if isinstance(tree.get(name), dict):
            _rename(document, tree[name], name)
            for key, field in kind.model_fields.items():
                if key in tree[name]:
                    _rename_inside(document, tree[name][key], (name, key), leaves()[f"{name}.{key}"])
                    tree[name][key] = _fill(document, tree[name][key], (name, key), environment_ok(field))
    if "deepspeed" in tree:
        tree["deepspeed"] = (
            {} if tree["deepspeed"] is None else _fill(document, tree["deepspeed"], ("deepspeed",), False)
        )


def _rename(document: YamlDocument, block: dict[str, Any], section: str) -> None:
    valid = sections()[section].model_fields if section else RunConfig.model_fields
    for key in [key for key in block if key not in valid]:
        path = (section, key) if section else (key,)
        near = nearest(section, key)
        if near:
            hint = "did you mean " + " or ".join(repr(found) for found in near) + "?"
        else:
            hint = f"{section or 'the top level'} has {', '.join(valid)}"
        place = document.keys.get(path, Location("configuration"))
        document.problems.append(Problem(place, show_key(path), f"unknown key; {hint}", "unknown-key"))
        value = block.pop(key)
        if near:
            _adopt(document, value, path, tuple(near[0].split(".")))


def _rename_inside(document: YamlDocument, value: Any, path: Key, leaf: Leaf) -> None:
    """Note unknown keys in the block, or list of blocks, that a key's value is; read a misspelt one as it was meant."""
    if leaf.listed and isinstance(value, list):
        for index, item in enumerate(value):
            _rename_block(document, item, (*path, index), leaf)
    elif not leaf.listed:
        _rename_block(document, value, path, leaf)


def _rename_block(document: YamlDocument, block: Any, path: Key, leaf: Leaf) -> None:
    if leaf.block is None or not isinstance(block, dict):
        return
    for key in [key for key in block if key not in leaf.inner]:
        near = inner_key(leaf, key)
        hint = f"did you mean {near!r}?" if near else f"{show_key(path)} has {', '.join(leaf.inner)}"
        place = document.keys.get((*path, key), Location("configuration"))
        document.problems.append(Problem(place, show_key((*path, key)), f"unknown key; {hint}", "unknown-key"))
        value = block.pop(key)
        if near and near not in block:
            block[near] = value
            document.values[(*path, near)] = place
    for key, value in block.items():
        _rename_inside(document, value, (*path, key), leaf.inner[key])


def _adopt(document: YamlDocument, value: Any, old: Key, new: Key) -> None:
    """Move a value to the key it was meant for, if that key is free and of the same kind (block or not)."""
    target = document.value
    for part in new[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            return
    leaf = leaves().get(show_key(new))
    is_block = leaf is None or leaf.raw
    if new[-1] in target or isinstance(value, dict) != is_block:
        target.setdefault(new[-1], Unread())
        return
    target[new[-1]] = value
    for places in (document.keys, document.values):
        for path in [path for path in places if path[: len(old)] == old]:
            places[new + path[len(old) :]] = places[path]


class Unread:
    """Stands for a required value whose key was misspelt and whose value does not fit: already reported once."""


def unread(value: Any) -> bool:
    """Say whether a value is only a stand-in for one already reported."""
    return isinstance(value, Unread)


def _fill(document: YamlDocument, value: Any, path: Key, allowed: bool) -> Any:
    """Return ``value`` with environment variables expanded where the schema allows them; check raw blocks."""
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, str) and _SECRET.search(key):
                message = (
                    "secrets do not belong in a configuration (it is saved with the run); set an environment variable"
                )
                _note(document, (*path, key), message, "secret")
        return {key: _fill(document, item, (*path, key), False) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(document, item, (*path, index), allowed) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    if _FORBIDDEN.search(value):
        _note(document, path, f"got {show(value)}; control characters are refused", "not-text")
        return value
    if "${" in value:
        return _substitute(document, value, path, allowed)
    return os.path.expanduser(value) if allowed and value.startswith("~/") else value


def _substitute(document: YamlDocument, value: str, path: Key, allowed: bool) -> str:
    if not allowed:
        places = ", ".join(leaf.key for leaf in leaves().values() if environment_ok(leaf.field))
        _note(document, path, f"got {show(value)}; ${{…}} is only read in {places}", "environment")
        return value
    filled = value
    for name in _ENVIRONMENT.findall(value):
        if name not in os.environ:
            _note(
                document, path, f"environment variable {name} is not set; set it, or write the path out", "environment"
            )
            return value
        if _FORBIDDEN.search(os.environ[name]) or "${" in os.environ[name]:
            _note(document, path, f"environment variable {name} holds control characters or ${{…}}", "environment")
            return value
        filled = filled.replace(f"${{env:{name}}}", os.environ[name])
    if "${" in filled:
        _note(document, path, f"got {show(value)}; the only form read here is ${{env:NAME}}", "environment")
        return value
    return filled


def _note(document: YamlDocument, path: Key, message: str, code: str) -> None:
    place = document.values.get(path) or document.keys.get(path) or Location("configuration")
    document.problems.append(Problem(place, show_key(path), message, code))

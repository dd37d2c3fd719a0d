"""Overrides from the command line: ``train.lr=1e-3``, parsed like the same text in the file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from longctx.config.keys import Leaf, leaves, nearest, sections
from longctx.config.problems import InvalidConfig, Location, Problem
from longctx.config.strict_yaml import YamlDocument, parse, show_key

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}(\.[A-Za-z0-9_-]{1,80}){0,15}", re.ASCII)


def apply(document: YamlDocument, overrides: Iterable[str]) -> None:
    """Write ``overrides`` into ``document`` in place (the last of several for one key wins), and record problems."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not _KEY.fullmatch(key):
            word = key if key.isprintable() else repr(key)
            message = "an override is written section.key=value, e.g. train.steps=100"
            document.problems.append(Problem(Location(f"override {word[:60]}"), "", message, "bad-override"))
            continue
        place = Location(f"override {key}")
        leaf = _leaf(key)
        if leaf is None:
            document.problems.append(Problem(place, "", _unknown(key), "unknown-override"))
            continue
        try:
            _set(document, tuple(key.split(".")), _value(text, leaf, place), place)
        except InvalidConfig as error:
            document.problems.extend(
                problem._replace(place=place, key=problem.key or key) for problem in error.problems
            )


def _leaf(key: str) -> Leaf | None:
    """Return the leaf that ``key`` names, or the raw block that contains it."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        leaf = leaves().get(".".join(parts[:length]))
        if leaf is not None:
            return leaf if length == len(parts) or leaf.raw else None
    return None


def _unknown(key: str) -> str:
    if key in sections():
        first = next(iter(sections()[key].model_fields))
        return f"is a section; override one of its keys, for example {key}.{first}=…"
    section, _, name = key.rpartition(".")
    if section in leaves():
        return f"unknown key; {section} takes a value and has no keys of its own"
    if section and section not in sections():  # a misspelt section: look for the key in the one it resembles
        section = next((found for found in nearest("", section) if found in sections()), "")
    found = [near for near in nearest(section, name) if near in leaves()]
    return "unknown key" + (
        f"; did you mean {' or '.join(map(repr, found))}?" if found else "; `longctx explain` lists all"
    )


def _value(text: str, leaf: Leaf, place: Location) -> Any:
    document = parse(text, str(place))
    if document.problems and not leaf.text_only:
        raise InvalidConfig(document.problems)
    value = document.value
    if leaf.text_only and not isinstance(value, str | None) or leaf.texts and isinstance(value, int | float):
        return text.strip()  # ``output.folder=2024`` means the text "2024"
    return value


def _set(document: YamlDocument, path: tuple[str, ...], value: Any, place: Location) -> None:
    target = document.value
    for depth, part in enumerate(path[:-1], 1):
        if target.get(part) is None:
            target[part] = {}
            document.keys.setdefault(path[:depth], place)
        target = target[part]
        if not isinstance(target, dict):
            message = f"cannot be set, because {show_key(path[:depth])} is not a block of keys in the file"
            raise InvalidConfig([Problem(place, show_key(path), message, "bad-override")])
    target[path[-1]] = value
    for places in (document.keys, document.values):
        for known in [known for known in places if known[: len(path)] == path]:
            del places[known]
        places[path] = place

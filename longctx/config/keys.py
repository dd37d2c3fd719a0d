"""The schema as a flat list of keys: what each accepts, and the valid key that a misspelt one resembles."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, TypeGuard, Union

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from longctx.config.fields import Section
from longctx.config.schema import RunConfig
from longctx.config.strict_yaml import Key
from longctx.config.synonyms import INNER_SYNONYMS, SYNONYMS


class Leaf(NamedTuple):
    """One key that takes a value."""

    key: str
    """dotted path, ``train.lr``"""
    field: FieldInfo

    @property
    def path(self) -> tuple[str, ...]:
        """The key as a path."""
        return tuple(self.key.split("."))

    @property
    def required(self) -> bool:
        """Whether the YAML must set it."""
        return self.field.is_required()

    @property
    def default(self) -> Any:
        """Its value if the YAML does not set it (None if required)."""
        value = self.field.get_default(call_default_factory=True)
        return None if value is PydanticUndefined else value

    @property
    def meaning(self) -> str:
        """Its description in the schema."""
        return self.field.description or ""

    def value_in(self, config: RunConfig) -> Any:
        """Return its value in a configuration."""
        value: Any = config
        for part in self.path:
            value = getattr(value, part)
        return value

    @property
    def raw(self) -> bool:
        """Whether it is a block of keys: free ones, or those of `block`."""
        return dict in kinds(self.field) or (self.block is not None and not self.listed)

    @property
    def block(self) -> type[Section] | None:
        """The section that its value is (or a list of them), None for a plain value."""
        return next((kind for kind in _parts(self.field.annotation) if _is_section(kind)), None)

    @property
    def listed(self) -> bool:
        """Whether its value is a list."""
        return tuple in kinds(self.field)

    @property
    def inner(self) -> dict[str, Leaf]:
        """The keys of its block by name, {} for a plain value."""
        if self.block is None:
            return {}
        prefix = f"{self.key}[]" if self.listed else self.key
        return {name: Leaf(f"{prefix}.{name}", field) for name, field in self.block.model_fields.items()}

    @property
    def text_only(self) -> bool:
        """Whether every value is text, so that ``output.folder=2024`` needs no quotes."""
        return all(kind is str for kind in kinds(self.field) if kind is not type(None))

    @property
    def texts(self) -> bool:
        """Whether it is a list of texts."""
        return typing.get_args(self.field.annotation) == (str, Ellipsis)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it accepts; empty if it accepts others too."""
        found = kinds(self.field)
        words = tuple(kind for kind in found if isinstance(kind, str))
        return words if len(words) == sum(kind is not type(None) for kind in found) else ()


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the section class of a field, or None for a leaf."""
    kind = field.annotation
    return kind if _is_section(kind) else None


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


@cache
def sections() -> dict[str, type[Section]]:
    """Return the sections of the YAML by name."""
    found = {name: section_of(field) for name, field in RunConfig.model_fields.items()}
    return {name: kind for name, kind in found.items() if kind is not None}


@cache
def leaves() -> dict[str, Leaf]:
    """Return every key that takes a value, by dotted path, in the order of the schema."""
    result = {}
    for name, field in RunConfig.model_fields.items():
        kind = section_of(field)
        inner = {name: field} if kind is None else {f"{name}.{key}": leaf for key, leaf in kind.model_fields.items()}
        result.update({key: Leaf(key, leaf) for key, leaf in inner.items()})
    return result


def find(path: Key) -> Leaf | None:
    """Return the leaf at a path of the YAML, inside blocks and lists of them too; None where there is no such key."""
    leaf = leaves().get(".".join(map(str, path[:1]))) or leaves().get(".".join(map(str, path[:2])))
    rest = path[len(leaf.path) :] if leaf else ()
    while leaf is not None and rest:
        if isinstance(rest[0], int) and leaf.listed:
            rest = rest[1:]
            continue
        leaf, rest = leaf.inner.get(str(rest[0])), rest[1:]
    return leaf


def kinds(field: FieldInfo) -> tuple[Any, ...]:
    """Return what a field accepts: types, and the words of a Literal as strings."""
    return _kinds(field.annotation)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and everything inside it: members of a union, items of a list."""
    yield annotation
    for part in typing.get_args(annotation):
        yield from _parts(part)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kinds(arguments[0])
    if origin in (Union, types.UnionType):
        return tuple(kind for argument in arguments for kind in _kinds(argument))
    if origin is Literal:
        return arguments
    return (origin or annotation,)


def expected(leaf: Leaf) -> str:
    """Describe what a key accepts: ``a whole number, at least 1, or auto``."""
    found = kinds(leaf.field)
    words = [kind for kind in found if isinstance(kind, str)]
    parts = []
    if int in found:
        parts.append("a whole number" + _bounds(leaf))
    if float in found:
        parts.append("a number" + _bounds(leaf))
    if bool in found:
        parts.append("true or false")
    if str in found:
        parts.append("text")
    if tuple in found:
        parts.append(_list_of(leaf))
    elif leaf.block is not None:
        parts.append(f"a block of keys ({', '.join(leaf.inner)})")
    if dict in found:
        parts.append("a block of keys")
    if words:
        parts.append(words[0] if len(words) == 1 else "one of " + ", ".join(words))
    if type(None) in found:
        parts.append("null")
    return ", or ".join(parts)


def _list_of(leaf: Leaf) -> str:
    if leaf.block is not None:
        return f"a list of blocks ({', '.join(leaf.inner)})"
    if leaf.texts:
        return "a list of texts"
    return f"a list of numbers{_bounds(leaf)}" if ... in _parts(leaf.field.annotation) else "two numbers [a, b]"


_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _bounds(leaf: Leaf) -> str:
    items = (*leaf.field.metadata, *_inner_limits(leaf.field.annotation))
    words = [
        f"{word} {_number(getattr(item, name))}"
        for name, word in _LIMITS.items()
        for item in items
        if hasattr(item, name)
    ]
    return " " + " and ".join(words) if words else ""


def _inner_limits(annotation: Any) -> list[Any]:
    """Return the metadata of ``Annotated`` types inside a union, where pydantic keeps the limits of one member."""
    found: list[Any] = []
    for item in getattr(annotation, "__metadata__", ()):
        found += item.metadata if isinstance(item, FieldInfo) else [item]
    for argument in typing.get_args(annotation):
        found += _inner_limits(argument)
    return found


def _number(value: float) -> str:
    if isinstance(value, int) and value > 2**14 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def nearest(section: str, name: str) -> tuple[str, ...]:
    """Return the valid dotted keys (best first, at most two) that ``name`` in ``section`` ('' for the top) may mean."""
    lowered = name.lower().replace("-", "_").strip("_")
    own = [key.removeprefix(f"{section}.") for key in leaves() if section and key.startswith(f"{section}.")]
    here = own if section else list(RunConfig.model_fields)
    close = _closest(lowered, here, 0.84)
    elsewhere = [key for key in leaves() if key.rpartition(".")[2] == lowered]
    if close:
        exact = [key for key in elsewhere if key.rpartition(".")[0] != section] if close != lowered else []
        return (_join(section, close), *exact[:1])
    if elsewhere:
        return tuple(sorted(elsewhere, key=lambda key: not key.startswith(("train.", "output."))))[:2]
    if lowered in SYNONYMS:
        return (SYNONYMS[lowered],)
    if section and lowered in RunConfig.model_fields:
        return (lowered,)
    close = _closest(lowered, here, 0.6)
    if close:
        return (_join(section, close),)
    names = {key.rpartition(".")[2]: key for key in reversed(leaves())}
    close = _closest(lowered, [*names, *SYNONYMS], 0.75)
    return (names.get(close) or SYNONYMS[close],) if close else ()


def inner_key(leaf: Leaf, name: str) -> str | None:
    """Return the key of a block that a wrong one was meant to be, or None."""
    lowered = name.lower().replace("-", "_")
    ending = [key for key in leaf.inner if len(lowered) > 3 and key.endswith(f"_{lowered}")]
    return (
        INNER_SYNONYMS.get(lowered)
        if INNER_SYNONYMS.get(lowered) in leaf.inner
        else (ending[0] if len(ending) == 1 else _closest(lowered, list(leaf.inner), 0.6))
    )


def _closest(name: str, candidates: list[str], cutoff: float) -> str | None:
    found = difflib.get_close_matches(name[:80], candidates, n=1, cutoff=cutoff)
    return found[0] if found else None


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name

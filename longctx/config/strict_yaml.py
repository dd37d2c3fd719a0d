"""A strict YAML reader: no surprising types, a location for every key and value, bounded resources.

YAML 1.2 numbers and booleans (``1e-4`` is a number; ``on``, ``no`` and ``22:22`` are text), no duplicate keys, no
tags, bounded size, depth and alias expansion. Problems that do not stop the parser are collected, not raised.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from longctx.config.problems import InvalidConfig, Location, Problem, show

MAX_BYTES = 32 * 1024
MAX_DEPTH = 24
MAX_NODES = 5_000

Key = tuple[str | int, ...]

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,29})", re.ASCII)
_ZERO_LED = re.compile(r"[-+]?0[0-9_]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII)
_INFINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class YamlDocument(NamedTuple):
    """Plain values, and the location of each key and each value."""

    value: Any
    keys: dict[Key, Location]
    values: dict[Key, Location]
    problems: list[Problem]


class _Refused(yaml.MarkedYAMLError):
    """An unsupported construct, at a mark."""

    def __init__(self, problem: str, mark: Any, code: str) -> None:
        super().__init__(problem=problem, problem_mark=mark)
        self.code = code


class StrictLoader(yaml.SafeLoader):
    """Compose nodes within limits; never construct Python objects."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0
        self.sizes: dict[int, int] = {}  # nodes below a finished anchored node, itself included

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        """Give every plain scalar its YAML 1.2 meaning; quoted ones are text."""
        if kind is not yaml.ScalarNode:
            return "map" if kind is yaml.MappingNode else "seq"
        if not implicit[0]:
            return "str"
        for tag, pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("zero", _ZERO_LED), ("float", _FLOAT)):
            if pattern.fullmatch(value):
                return tag
        return "float" if _INFINITE.fullmatch(value) else "str"

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node; reject tags and anything beyond the limits."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = self.anchors.get(event.anchor)
            if node is None or id(node) not in self.sizes:
                raise _Refused(
                    f"alias *{event.anchor} has no finished &{event.anchor} before it", event.start_mark, "alias"
                )
            self._count(self.sizes[id(node)], event)
            return super().compose_node(parent, index)
        if event.tag is not None:
            raise _Refused(
                f"tag {event.tag!r} is refused; write plain values, and quote what is text", event.start_mark, "tag"
            )
        if self.depth >= MAX_DEPTH:
            raise _Refused(f"nested deeper than {MAX_DEPTH} levels", event.start_mark, "too-deep")
        before = self.nodes
        self._count(1, event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if event.anchor is not None:
            self.sizes[id(node)] = self.nodes - before
        return node

    def _count(self, nodes: int, event: Any) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise _Refused(f"more than {MAX_NODES} values, aliases expanded", event.start_mark, "too-large")


def read(path: str | Path) -> bytes:
    """Return the content of a file; if it is too large, only as much as `parse` needs to reject it.

    Raises:
        InvalidConfig: there is no such file, or it cannot be read.
    """
    file, location = Path(path), Location(str(path))
    try:
        if not file.is_file():
            what = "is a folder" if file.is_dir() else "does not exist" if not file.exists() else "is not a plain file"
            raise _stop(location, f"{what}; give the path of a YAML file", "no-file")
        with file.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise _stop(location, f"cannot be read: {error.strerror}", "no-file") from None


def parse(content: bytes | str, name: str) -> YamlDocument:
    """Parse one YAML document.

    Raises:
        InvalidConfig: it is not YAML, or uses tags, or exceeds a limit. Lesser problems (duplicate keys, numbers
            that YAML versions read differently, …) are in the result's ``problems``.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidConfig(
            [Problem(Location(name), "", f"is not UTF-8 text (byte {error.start})", "not-text")]
        ) from None
    if len(text) > MAX_BYTES:
        message = f"is larger than {MAX_BYTES // 1024} KiB; a configuration is a short text"
        raise _stop(Location(name), message, "too-large")
    try:
        loader = StrictLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise InvalidConfig([_syntax_problem(error, name)]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        message = f"character U+{_code(error.character):04X} is not allowed in YAML"
        raise _stop(Location(name, line, column), message, "not-text") from None
    except (ValueError, OverflowError):  # PyYAML lets chr() and int() fail on escapes and directives out of range
        raise InvalidConfig(
            [Problem(Location(name), "", "has an escape or directive out of range", "syntax")]
        ) from None
    document = YamlDocument(None, {}, {}, [])
    if node is None:
        return document
    return document._replace(value=_convert(node, (), document, name))


def _stop(location: Location, message: str, code: str) -> InvalidConfig:
    """Return the error for a text that cannot be read at all."""
    return InvalidConfig([Problem(location, "", message, code)])


def _syntax_problem(error: yaml.MarkedYAMLError, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    place = Location(name, mark.line + 1, mark.column + 1) if mark else Location(name)
    if isinstance(error, _Refused):
        return Problem(place, "", str(error.problem), error.code)
    what = "; ".join(part for part in (error.context, error.problem) if part)
    hint = "; indent with spaces" if "'\\t'" in what else ""
    return Problem(place, "", f"is not valid YAML: {what}{hint}", "syntax")


def _place(node: Any, name: str) -> Location:
    return Location(name, node.start_mark.line + 1, node.start_mark.column + 1)


def _convert(node: Any, path: Key, document: YamlDocument, name: str) -> Any:
    """Turn a node into plain values, recording locations and problems. Composing has bounded depth and size."""
    document.values[path] = _place(node, name)
    if isinstance(node, yaml.SequenceNode):
        return [_convert(item, (*path, index), document, name) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(node, path, document, name)
    problem = None
    if node.tag == "null":
        return None
    if node.tag == "bool":
        return node.value.lower() == "true"
    if node.tag == "int":
        return int(node.value)
    if node.tag == "float":
        return float(re.sub(r"\.(inf|nan)", r"\1", node.value.lower()))
    if node.tag == "zero":
        plain = node.value.replace("_", "").lstrip("+-0") or "0"
        problem = (
            f"got {node.value}; a leading zero is octal in YAML 1.1 and decimal in 1.2; write {plain}",
            "leading-zero",
        )
    elif _FORBIDDEN.search(node.value):
        problem = (f"got {show(node.value)}; control characters and lone surrogates are refused", "not-text")
    if problem:
        document.problems.append(Problem(_place(node, name), show_key(path), *problem))
    return node.value


def _code(character: Any) -> int:
    """Return the code point that PyYAML names, as a number or as a character."""
    return character if isinstance(character, int) else ord(str(character)[:1])


def _convert_mapping(node: Any, path: Key, document: YamlDocument, name: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = _place(key_node, name)
        if not isinstance(key_node, yaml.ScalarNode) or (key_node.tag != "str") or _FORBIDDEN.search(key_node.value):
            given = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or block"
            message = f"got {show(given)} as a key; keys are words (a number in quotes)"
            document.problems.append(Problem(place, show_key(path), message, "bad-key"))
            continue
        key = key_node.value
        if key == "<<":
            message = "merge keys (<<) are not read; write the keys out"
            document.problems.append(Problem(place, show_key(path), message, "merge-key"))
            continue
        here = (*path, key)
        if key in result:
            message = f"is given twice, first in line {document.keys[here].line}; keep one"
            document.problems.append(Problem(place, show_key(here), message, "duplicate-key"))
            continue
        document.keys[here] = place
        result[key] = _convert(value_node, here, document, name)
    return result


def show_key(path: Key) -> str:
    """Return ``("data", "sources", 1)`` as ``data.sources[1]``; odd characters are escaped."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            word = part if part.isprintable() and len(part) <= 60 else repr(part[:60])[1:-1] + "…" * (len(part) > 60)
            text += f".{word}" if text else word
    return text

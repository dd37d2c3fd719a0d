"""Parse the valid blocks of a YAML with syntax errors, so that one syntax error hides no other mistake.

A section, or a key of one, that does not parse by itself is reported and blanked out; the rest is parsed as usual, at
the same lines and columns.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from longctx.config.keys import sections
from longctx.config.problems import InvalidConfig, Problem
from longctx.config.strict_yaml import YamlDocument, parse

_HEAD = re.compile(r"([ \t]*)([A-Za-z_][A-Za-z0-9_-]{0,80})\s*:(?:\s|$)")
_MARKS = ("---", "...", "%")  # several documents, or directives: not recovered
_WHOLE = ("too-large", "not-text")  # codes of problems that concern the whole text


class _Block(NamedTuple):
    """The lines of one key, up to the next key."""

    key: str
    first: int
    end: int


def parse_or_recover(content: bytes | str, name: str) -> YamlDocument:
    """Like ``strict_yaml.parse``, but syntax errors in some blocks leave the other blocks readable.

    The syntax errors are among the result's problems; their keys are the blocks that have no value.

    Raises:
        InvalidConfig: the text is not a configuration, or the error cannot be attributed to a block.
    """
    try:
        return parse(content, name)
    except InvalidConfig as error:
        if any(problem.code in _WHOLE for problem in error.problems):
            raise
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        document = _recover(text.split("\n"), error.problems[0], name)
        if document is None:
            raise
        return document


def _recover(lines: list[str], first: Problem, name: str) -> YamlDocument | None:
    """Return the document without the blocks that do not parse; None if it still does not parse."""
    blocks = _blocks(lines, 0, len(lines), top=True)
    if any(line.startswith(_MARKS) for line in lines) or not any(block.key in sections() for block in blocks):
        return None
    problems: list[Problem] = []
    for section in blocks:
        for block, problem in _wrong_in(lines, section, name):
            problems.append(problem._replace(key=block.key))
            lines = [*lines[: block.first], *[""] * (block.end - block.first), *lines[block.end :]]
    if not problems:
        return None
    if len(problems) == 1:  # the error of the whole text may be more specific
        problems = [first._replace(key=problems[0].key)]
    try:
        document = parse("\n".join(lines), name)
    except InvalidConfig:
        return None
    value = {} if document.value is None else document.value
    return document._replace(value=value, problems=[*problems, *document.problems])


def _wrong_in(lines: list[str], section: _Block, name: str) -> list[tuple[_Block, Problem]]:
    """Return the keys of a section that do not parse, or the whole section if no single key fails by itself."""
    problem = _problem(lines, [section], name)
    if problem is None:
        return []
    head = section._replace(end=section.first + 1)
    found = []
    for block in _blocks(lines, section.first + 1, section.end, top=False):
        inner = _problem(lines, [head, block], name)
        if inner is not None:
            found.append((block._replace(key=f"{section.key}.{block.key}"), inner))
    return found or [(section, problem)]


def _blocks(lines: list[str], first: int, end: int, *, top: bool) -> list[_Block]:
    """Return the blocks that begin in these lines, at column 0 or at the indentation of the first of them."""
    indent: str | None = "" if top else None
    starts: list[tuple[str, int]] = []
    for number in range(first, end):
        match = _HEAD.match(lines[number])
        if match is None:
            continue
        if indent is None and "\t" not in match[1]:
            indent = match[1]
        # a tab or too little indentation is an error of this key
        if indent is None or len(match[1]) <= len(indent) or (not top and "\t" in match[1]):
            starts.append((match[2], number))
    ends = [*(number for _, number in starts), end][1:]
    return [_Block(key, number, stop) for (key, number), stop in zip(starts, ends, strict=True)]


def _problem(lines: list[str], kept: list[_Block], name: str) -> Problem | None:
    """Return the problem of the text reduced to the blocks ``kept``, if any."""
    alone = [""] * len(lines)
    for block in kept:
        alone[block.first : block.end] = lines[block.first : block.end]
    try:
        parse("\n".join(alone), name)
    except InvalidConfig as error:
        problem = error.problems[0]
        defined_elsewhere = problem.code == "alias" and any("&" in line for line in lines)
        return None if defined_elsewhere else problem
    return None

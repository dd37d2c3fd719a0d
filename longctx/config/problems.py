"""A problem of a configuration, and the error that carries all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from longctx.errors import ConfigError

_LONGEST_VALUE = 60
_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]*@")
_KEY_SHAPED = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|glpat-|xox[abprs]-|AKIA|ASIA|eyJ)[A-Za-z0-9_\-./+=]{8,}|\b[0-9a-fA-F]{40,}\b"
)


class Location(NamedTuple):
    """Where something is written: in a file, or in an override on the command line (line 0)."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class Problem(NamedTuple):
    """One mistake: its location and key, what is wrong and what to write instead, and a code to look up."""

    place: Location
    key: str
    message: str
    code: str

    def __str__(self) -> str:
        key = f"{self.key}: " if self.key else ""
        return f"{self.place}  {key}{self.message}  [{self.code}]"


class InvalidConfig(ConfigError):
    """Every problem of one configuration; ``str()`` gives one line each, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        once = dict.fromkeys(problems)
        self.problems = tuple(sorted(once, key=lambda problem: (problem.place.line == 0, problem.place[1:])))
        super().__init__("\n".join(map(str, self.problems)))


def show(value: Any) -> str:
    """Return ``value`` as YAML users know it: short, without control characters, and without anything secret."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a block of keys" if value else "{}"
    if isinstance(value, list | tuple):
        text = "[" + ", ".join(show(item) for item in value[:8]) + (", …]" if len(value) > 8 else "]")
    else:
        text = repr(redact(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def redact(text: str) -> str:
    """Return ``text`` with URL credentials, and anything that looks like an access key, replaced by ``***``."""
    return _KEY_SHAPED.sub("***", _CREDENTIALS.sub("***@", text))

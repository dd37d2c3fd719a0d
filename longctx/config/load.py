"""Load a configuration: a YAML file and overrides become one frozen RunConfig, or an error with every problem."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from longctx.config import overrides as command_line
from longctx.config.derived import CPU_RANKS, world_size
from longctx.config.fields import UnknownValue
from longctx.config.findings import Finding
from longctx.config.keys import Leaf, expected, find, leaves, sections
from longctx.config.machine import inspect
from longctx.config.partial import partial_config, without
from longctx.config.pretrained import FOLDER_RULES
from longctx.config.problems import InvalidConfig, Location, Problem, show
from longctx.config.recover import parse_or_recover
from longctx.config.rules import broken
from longctx.config.schema import RunConfig
from longctx.config.stages import fill_in, judge_run
from longctx.config.strict_yaml import Key, YamlDocument, read, show_key
from longctx.config.tidy import tidy, unread

World = int | Callable[[RunConfig], int]


class Loaded(NamedTuple):
    """A configuration, and where each key is set."""

    config: RunConfig
    sources: dict[str, Location]
    """dotted key -> location; keys left at their default are not in it"""
    document: YamlDocument
    name: str

    def problem(self, finding: Finding) -> Problem:
        """Return a finding about this configuration with its location."""
        place = _locate(self.document, _path(finding.key), self.name)
        return Problem(place, finding.key, finding.message, finding.code)


def load(path: str | Path, overrides: Iterable[str] = (), *, default_world: World = CPU_RANKS) -> RunConfig:
    """Read, validate and cross-check a configuration.

    Args:
        path: a YAML file.
        overrides: ``section.key=value`` strings, stronger than the file.
        default_world: ranks if neither a launcher nor `mesh` sets them, or a function from the configuration to it.

    Raises:
        InvalidConfig: a ConfigError with every problem, one line each.
    """
    return load_with_sources(path, overrides, default_world=default_world).config


def load_with_sources(path: str | Path, overrides: Iterable[str] = (), *, default_world: World = CPU_RANKS) -> Loaded:
    """Like ``load``, but also return where each value is set."""
    return _valid(*_read(read(path), str(path), overrides, default_world))


def loads(
    text: str | bytes, overrides: Iterable[str] = (), *, name: str = "<text>", default_world: World = CPU_RANKS
) -> Loaded:
    """Like ``load_with_sources`` for text that is already in memory."""
    return _valid(*_read(text, name, overrides, default_world))


def _valid(loaded: Loaded, problems: list[Problem]) -> Loaded:
    if problems:
        raise InvalidConfig(problems)
    return loaded


def _read(text: str | bytes, name: str, overrides: Iterable[str], default_world: World) -> tuple[Loaded, list[Problem]]:
    """Return the valid part of a configuration, and every problem that its text shows.

    Each pass checks what the earlier passes left valid: syntax, names of keys, types and ranges, rules between keys.
    """
    document = parse_or_recover(text, name)
    if not isinstance(document.value, dict):
        what = "is empty" if document.value is None else f"got {show(document.value)}; expected sections"
        hint = f"write {', '.join(sections())}, or let `longctx init` write a first one"
        raise InvalidConfig([Problem(Location(name, 1, 1), "", f"{what}; {hint}", "empty"), *document.problems])
    command_line.apply(document, overrides)
    tidy(document)
    fill_in(document.value)
    problems, unknown = list(document.problems), frozenset[str]()
    config: RunConfig | None
    try:
        config = RunConfig.model_validate(document.value)
    except ValidationError as error:
        problems += _translate(error, document, name)
        config, unknown = partial_config(document.value)
    if config is None:
        raise InvalidConfig(problems)
    config = _with_tokenizer(without(config, {*unknown, *(problem.key for problem in problems)}))
    sources = {key: document.values[path] for key in leaves() if (path := tuple(key.split("."))) in document.values}
    loaded = Loaded(config, sources, document, name)
    reported = {problem.key for problem in problems}
    problems += [
        loaded.problem(finding)
        for finding in broken(config, _world(config, default_world))
        if not any(finding.key == key or finding.key.startswith(f"{key}.") for key in reported)
    ]
    addresses = {problem.key for problem in problems if problem.code == "url"} - {"data.sources"}
    return loaded._replace(config=without(config, addresses)), problems


def _world(config: RunConfig, default: World) -> int | None:
    """Return the number of ranks; None if a key that decides it has no value."""
    try:
        if not isinstance(default, int):
            default = default(config) if config.mesh.world == "auto" else CPU_RANKS
        return world_size(config, default)
    except UnknownValue:
        return None


def load_for_rank(path: str | Path, overrides: Iterable[str] = (), *, default_world: World = CPU_RANKS) -> RunConfig:
    """Like ``load``, for a rank that another launcher has started: check the model's folder too.

    Raises:
        InvalidConfig: as ``load``, and if the pretrained folder or the tokenizer does not fit.
    """
    loaded = load_with_sources(path, overrides, default_world=default_world)
    config = loaded.config
    findings = judge_run(FOLDER_RULES, config) if config.model.pretrained is not None else []
    _valid(loaded, [loaded.problem(finding) for finding in findings])
    return config


def load_for_machine(
    path: str | Path, overrides: Iterable[str] = (), *, default_world: World = CPU_RANKS, starting: bool = True
) -> tuple[Loaded, list[str]]:
    """Load a configuration and check this machine together; return (configuration, notes).

    Raises:
        InvalidConfig: with every mistake of the file and everything that this machine lacks.
    """
    loaded, problems = _read(read(path), str(path), overrides, default_world)
    report = inspect(loaded.config, starting)
    _valid(loaded, [*problems, *map(loaded.problem, report.findings)])
    return loaded, report.notes


def _with_tokenizer(config: RunConfig) -> RunConfig:
    """Resolve `data.tokenizer: auto`, so that later code reads a name."""
    try:
        if config.data.tokenizer != "auto":
            return config
        own = None if config.data.foreign_tokenizer else config.model.pretrained
    except UnknownValue:
        return without(config, {"data.tokenizer"})
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": own or "bpe"})})


def require_machine(loaded: Loaded, starting: bool = True) -> list[str]:
    """Check that this machine has what a configuration needs; return notes that do not stop a run.

    Args:
        loaded: what ``load_with_sources`` returned.
        starting: the run starts here and now (see ``machine.inspect``).

    Raises:
        InvalidConfig: a file is missing, a folder cannot be written, the disk is too small, a package is absent.
    """
    report = inspect(loaded.config, starting)
    _valid(loaded, [loaded.problem(finding) for finding in report.findings])
    return report.notes


def _path(key: str) -> Key:
    """Return ``train.stages[1].lr`` as ``("train", "stages", 1, "lr")``."""
    return tuple(int(part) if part.isdecimal() else part for part in key.replace("[", ".").replace("]", "").split("."))


def _locate(document: YamlDocument, path: Key, name: str) -> Location:
    """Return the location of ``path``, or of the innermost enclosing block that the text has."""
    for length in range(len(path), 0, -1):
        inner = document.keys.get(path[:length]) or document.values.get(path[:length])
        found = document.values.get(path[:length]) if length == len(path) else inner
        if found:
            return found
    return Location(name, 1, 1)


def _translate(error: ValidationError, document: YamlDocument, name: str) -> list[Problem]:
    """Turn pydantic's errors into Problems: one per key, in the schema's words."""
    found: dict[Key, Problem] = {}
    reported = {problem.key for problem in document.problems}
    for item in error.errors(include_url=False, include_context=False):
        path, leaf = _schema_key(item["loc"])
        block_reported = item["type"] == "missing" and show_key(path[:-1]) in reported
        if path in found or show_key(path) in reported or block_reported or unread(item["input"]):
            continue
        message, code = _describe(item, path, leaf)
        found[path] = Problem(_locate(document, path, name), show_key(path), message, code)
    return list(found.values())


def _schema_key(loc: tuple[int | str, ...]) -> tuple[Key, Leaf | None]:
    """Split pydantic's location into (path as users see it, key of the schema); union members are dropped."""
    length = 2 if loc[0] in sections() else 1
    while length < len(loc) and (leaf := find(loc[:length])) is not None:
        within = isinstance(loc[length], int) and (leaf.block is not None or leaf.texts)
        if not within and str(loc[length]) not in leaf.inner:
            break
        length += 1
    return loc[:length], find(loc[:length])


def _describe(item: Any, path: Key, leaf: Leaf | None) -> tuple[str, str]:
    if leaf is None:
        key = ".".join(map(str, path))
        block = f"a block of keys ({', '.join(sections()[key].model_fields)})" if key in sections() else "a known key"
        if item["type"] == "missing":
            required = [name for name, field in sections()[key].model_fields.items() if field.is_required()]
            return f"is missing; it needs {', '.join(required) or 'architecture or pretrained'}", "missing"
        return f"got {show(item['input'])}; expected {block}", "wrong-type"
    if item["type"] == "missing":
        return f"is missing; expected {expected(leaf)}: {leaf.meaning}", "missing"
    given = item["input"]
    message = f"got {show(given)}; expected {expected(leaf)}{_hint(given, leaf)}"
    return message, "out-of-range" if item["type"].startswith(("greater", "less", "too_")) else "wrong-type"


def _hint(given: Any, leaf: Any) -> str:
    if isinstance(given, str):
        lowered = given.lower()
        if lowered == "nvme" and "cpu" in (leaf.choices or ()):
            return "; parameters on NVMe are not supported, as DeepSpeed runs out of buffers for them: use cpu"
        if leaf.choices or "auto" in expected(leaf):
            near = difflib.get_close_matches(lowered[:80], leaf.choices or ["auto"], n=1, cutoff=0.5)
            return f"; did you mean {near[0]!r}?" if near else ""
        if lowered in ("yes", "on", "y", "no", "off", "n") and "true or false" in expected(leaf):
            return f"; did you mean '{'true' if lowered in ('yes', 'on', 'y') else 'false'}'?"
    elif leaf.text_only and isinstance(given, int | float):
        return f"; quote it: '{show(given)}'"
    return ""

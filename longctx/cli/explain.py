"""`longctx explain`: the meaning of configuration keys, their values in a file, and where each value was set."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longctx.errors import ConfigError

if TYPE_CHECKING:
    from longctx.config.explain import Row


def explain(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [KEY|KEY=VALUE]...")] = None,
) -> None:
    """Explain configuration keys and values.

    With CONFIG it also shows each value and where it was set.
    """
    from longctx.config.derived import CPU_RANKS
    from longctx.config.explain import explain as rows_of
    from longctx.config.load import load_with_sources
    from longctx.launch.cluster.hosts import default_world

    words = list(arguments or [])
    given = words.pop(0) if words and _names_a_file(words[0]) else None
    overrides = [word for word in words if "=" in word]
    keys = [word for word in words if "=" not in word]
    if overrides and given is None:
        raise ConfigError("explain: overrides change a configuration; give its file first")
    loaded = load_with_sources(given, overrides, default_world=default_world) if given else None
    world = default_world(loaded.config) if loaded else CPU_RANKS
    _print_rows(rows_of(loaded, keys, default_world=world), long=bool(keys))


def _names_a_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) or os.sep in word or ("=" not in word and Path(word).is_file())


def _print_rows(rows: list[Row], long: bool) -> None:
    if long:
        for row in rows:
            value = f" = {row.value}" if row.value else ""
            typer.echo(f"{row.key}{value}  ({row.source})\n    {row.meaning}\n    {row.expected}")
        return
    if not sys.stdout.isatty():
        _print_lines(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("key", no_wrap=True)
    for name in ("value", "source", "meaning"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row.key, row.value, row.source, row.meaning)
    Console(markup=False, highlight=False).print(table)


def _print_lines(rows: list[Row]) -> None:
    """Print one line per key, for a pipe or a file; a value of more than 40 characters does not widen its column."""
    lines = [("key", "value", "source", "meaning"), *((row.key, row.value, row.source, row.meaning) for row in rows)]
    widths = [min(max(len(line[column]) for line in lines), 40) for column in range(3)]
    for key, value, source, meaning in lines:
        typer.echo(f"{key:<{widths[0]}} {value:<{widths[1]}} {source:<{widths[2]}} {meaning}")

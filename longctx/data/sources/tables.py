"""Rows of CSV files: the column of the text, or a prompt with its completion."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from longctx.data.sources.document import TEXT, Kind
from longctx.data.sources.records import conversation_of
from longctx.data.sources.streams import Stream
from longctx.errors import DataError

_MAX_CELL = 2**30
_PAIR = ("prompt", "completion")


def csv_rows(stream: Stream, field: str | None, delimiter: str) -> Iterator[tuple[str, Kind, str]]:
    """Yield (number of the row, kind, text) of a table with a header line.

    Raises:
        DataError: no column ``field`` nor ``prompt`` and ``completion``, a row of another width than the header, or a
            quote that is never closed.
    """
    csv.field_size_limit(_MAX_CELL)
    rows = csv.reader(_lines(stream.text()), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        pair = header.count(field or "") != 1
        if pair and any(header.count(name) != 1 for name in _PAIR):
            raise DataError(
                f"{stream.file}: this table has no column {field or 'prompt'!r} (found: "
                f"{', '.join(map(repr, header[:8]))}); give the column that holds the "
                "text as data.text_field, or read the file as it is with data.format: text"
            )
        for number, row in enumerate(rows, 1):
            if row and len(row) != len(header):
                raise DataError(
                    f"{stream.file}:{rows.line_num}: row {number} has {len(row)} columns, the header {len(header)}; "
                    "repair or remove it"
                )
            if row and pair:
                record = {name: row[header.index(name)] for name in _PAIR}
                yield str(number), *conversation_of(record, f"{stream.file}: row {number}")
            elif row:
                yield str(number), TEXT, row[header.index(field or "")]
    except csv.Error as error:
        raise DataError(f"{stream.file}:{rows.line_num}: not a table ({error}); repair it") from None


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    """Yield lines with their ends, as ``csv`` expects: only line feeds and carriage returns end a line."""
    rest: list[str] = []
    for chunk in chunks:
        whole, end, after = chunk.rpartition("\n")
        if end:
            yield from io.StringIO("".join([*rest, whole, end]), newline="")
            rest = []
        rest.append(after)
    yield from io.StringIO("".join(rest), newline="")

"""The text column of CSV files and of parquet files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from longctx.data.sources.streams import Stream
from longctx.errors import DataError, MissingPackageError

_MAX_CELL = 2**30
_ROWS = 64


def csv_rows(stream: Stream, field: str, delimiter: str) -> Iterator[tuple[str, str]]:
    """Yield (number of the row, text) of a table with a header line.

    Raises:
        DataError: no column ``field``, a row of another width than the header, or a quote that is never closed.
    """
    csv.field_size_limit(_MAX_CELL)
    rows = csv.reader(_lines(stream.text()), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if header.count(field) != 1:
            raise DataError(
                f"{stream.file}: this table has no column {field!r} (found: {', '.join(map(repr, header[:8]))}); give "
                "the column that holds the text as data.text_field, or read the file as it is with data.format: text"
            )
        column = header.index(field)
        for number, row in enumerate(rows, 1):
            if row and len(row) != len(header):
                raise DataError(
                    f"{stream.file}:{rows.line_num}: row {number} has {len(row)} columns, the header {len(header)}; "
                    "repair or remove it"
                )
            if row:
                yield str(number), row[column]
    except csv.Error as error:
        raise DataError(f"{stream.file}:{rows.line_num}: not a table ({error}); repair it") from None


def parquet_rows(file: Path, field: str) -> Iterator[tuple[str, str]]:
    """Yield (number of the row, text) of a parquet file.

    Raises:
        DataError: damaged, no such column, or a row without text.
        MissingPackageError: ``pyarrow`` is not installed.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingPackageError(
            f"{file}: reading parquet needs the package `pyarrow`: pip install 'longctx[data]', or convert the file "
            "to JSON lines"
        ) from None
    try:
        with ParquetFile(file, page_checksum_verification=True) as table:
            names = list(table.schema_arrow.names)
            if field not in names:
                raise DataError(
                    f"{file}: no column {field!r} (found: {', '.join(map(repr, names[:8]))}); give the column that "
                    "holds the text as data.text_field"
                )
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        kind = "null" if text is None else type(text).__name__
                        raise DataError(f"{file}: row {number}: {field!r} is {kind}, not text; repair or remove it")
                    yield str(number), text
    except DataError:
        raise
    except Exception as error:  # the package's errors have no common base
        raise DataError(f"{file}: cannot be read as parquet, it is damaged: {error}; copy it again") from None


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

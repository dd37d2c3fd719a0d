"""Rows of parquet and Arrow files, and of folders that ``datasets`` saved, through the package ``pyarrow``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longctx.data.sources.document import TEXT, Kind
from longctx.data.sources.records import COLUMNS, conversation_of, is_conversation, without_nulls
from longctx.errors import DataError, MissingPackageError

_ROWS = 64
_STATE, _SPLITS = "state.json", "dataset_dict.json"
Rows = Iterator[tuple[str, Kind, str]]


def parquet_rows(file: Path, field: str | None) -> Rows:
    """Yield (number of the row, kind, text) of a parquet file.

    Raises:
        DataError: damaged, no such column, or a row without text.
        MissingPackageError: ``pyarrow`` is not installed.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise _missing(file, "parquet") from None
    with _damaged(file, "parquet"), ParquetFile(file, page_checksum_verification=True) as table:
        names = _columns(list(table.schema_arrow.names), field, file)
        yield from _rows(table.iter_batches(batch_size=_ROWS, columns=names), field, file)


def arrow_rows(file: Path, field: str | None) -> Rows:
    """Yield (number of the row, kind, text) of an Arrow file, or of an Arrow stream. Raises: as ``parquet_rows``."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise _missing(file, "Arrow") from None
    with _damaged(file, "Arrow"), pyarrow.memory_map(str(file)) as source:
        stream = source.read(6) != b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_stream(source) if stream else pyarrow.ipc.open_file(source)
        names = _columns(list(reader.schema.names), field, file)
        batches = reader if stream else map(reader.get_batch, range(reader.num_record_batches))
        slices = (batch.slice(at, _ROWS) for batch in batches for at in range(0, batch.num_rows, _ROWS))
        yield from _rows((batch.select(names) for batch in slices), field, file)


def saved_dataset(folder: Path) -> list[Path] | None:
    """Return the Arrow files of a folder that ``Dataset.save_to_disk`` wrote, in order; None for another folder.

    Raises:
        DataError: it holds several splits, or its list of files is damaged.
    """
    if (folder / _SPLITS).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{_STATE}"))
        raise DataError(
            f"{folder} holds the splits {', '.join(splits)} of a dataset; give the folder of one of them: "
            f"{folder / splits[0] if splits else folder}"
        )
    if not (folder / _STATE).is_file() or not (folder / "dataset_info.json").is_file():
        return None
    try:
        return [folder / str(entry["filename"]) for entry in json.loads((folder / _STATE).read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / _STATE}: not what `datasets` writes ({error}); save the dataset again") from None


def row_of(row: dict[str, Any], field: str | None, where: str) -> tuple[Kind, str]:
    """Return the kind and the text of one row. Raises: DataError: neither text nor a conversation."""
    if field not in row and is_conversation(row):
        return conversation_of(without_nulls(row), where)
    text = row.get(field or "")
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {field!r} is {'null' if text is None else type(text).__name__}, not text; repair or remove it"
        )
    return TEXT, text


def _columns(names: Sequence[str], field: str | None, file: Path) -> list[str]:
    """Return the columns to read. Raises: DataError: none of them holds text."""
    if field is not None and field in names:
        return [field]
    if is_conversation(list(names)):
        return [name for name in COLUMNS if name in names]
    found = ", ".join(map(repr, names[:8]))
    if field is None:
        raise DataError(f"{file}: no messages, and no prompt with a completion (found: {found}); set data.format: auto")
    raise DataError(
        f"{file}: no column {field!r} (found: {found}); give the column that holds the text as data.text_field"
    )


def _rows(batches: Any, field: str | None, file: Path) -> Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield str(number), *row_of(row, field, f"{file}: row {number}")


def _missing(file: Path, what: str) -> MissingPackageError:
    return MissingPackageError(
        f"{file}: reading {what} needs the package `pyarrow`: pip install 'longctx[data]', or convert the file to JSON "
        "lines"
    )


@contextmanager
def _damaged(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the package's errors have no common base
        raise DataError(f"{file}: cannot be read as {what}, it is damaged: {error}; copy it again") from None

"""Rows of Hugging Face datasets, through the package ``datasets``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from longctx.data.sources.columns import row_of
from longctx.data.sources.document import Document, LeftOut
from longctx.data.sources.pieces import pieces
from longctx.data.sources.records import is_conversation
from longctx.errors import DataError, MissingPackageError


class HuggingFace:
    """A split of a Hugging Face dataset (a local folder, or a name, which ``datasets`` may download).

    Args:
        dataset, config, split: as ``datasets.load_dataset`` takes them.
        field: the column of the text; None: only conversations are read.
        streaming: read rows as they arrive, without the copy that ``datasets`` keeps in its cache.
    """

    def __init__(
        self, dataset: str, config: str | None, split: str, field: str | None = "text", *, streaming: bool = False
    ) -> None:
        self.name = f"hf:{dataset}"
        self.dataset, self.config, self.split, self.field = dataset, config, split, field
        self.streaming = streaming
        self.skipped: dict[str, LeftOut] = {}
        self.formats: Counter[str] = Counter({"dataset": 1})

    def stamp(self) -> None:
        return None

    def documents(self) -> Iterator[Document]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise MissingPackageError(
                "the package `datasets` is not installed: `pip install 'longctx[data]'`, or give text files or JSONL"
            ) from None
        try:
            rows = load_dataset(self.dataset, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:  # its errors have no common base
            raise DataError(f"{self.name}: `datasets` cannot load split {self.split!r}: {error}") from None
        for number, row in enumerate(rows):
            where = f"{self.name}: row {number}"
            if self.field not in row and not is_conversation(row):
                raise DataError(
                    f"{where} has no text under {self.field!r} (found: {', '.join(row)}); give the column that holds "
                    "the text as data.text_field"
                )
            kind, text = row_of(row, self.field, where)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{where}: half of a surrogate pair at character {error.start}; repair it") from None
            yield Document(f"{self.dataset}:{number}", pieces([text]), kind)

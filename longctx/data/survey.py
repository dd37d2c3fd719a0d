"""The documents of a build, streamed several times: counts, hashes, the held-out split and the BPE's sample."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from longctx.data.sources.document import PAIR, Document, Kind, Source
from longctx.errors import DataError

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all (0 while unknown)


class Survey:
    """One pass over all documents: their number, sizes, and a 128-bit hash of each.

    Attributes:
        bytes, characters, empty: of all documents: UTF-8 bytes, characters, and how many are blank.
        source_ends: how many documents there are up to the end of each source.
        kinds: how many documents there are of each kind.
        skipped, formats: files left out and why; how many files were read in each format.
        content: hash of all texts and names, in order.
        split, sample: (documents,) uint64, hashes of (seed, text) that choose held-out documents and the BPE's sample.

    Raises:
        DataError: no text at all, or a source that cannot be read.
    """

    def __init__(self, sources: list[Source], seed: int, progress: Progress) -> None:
        self.sources, self.seed, self.progress = sources, seed, progress
        self.bytes = self.characters = 0
        self._kept = bytearray()  # for every document, in order: 1, or 0 if it is blank
        self.kinds: Counter[Kind] = Counter()
        split, sample = array("Q"), array("Q")
        content = hashlib.sha256()
        self.source_ends: list[int] = []
        for document in self._read(lambda: self.source_ends.append(len(split))):
            seen = _Seen(self)
            for piece in document.pieces:
                seen.add(piece)
                progress("reading", self.bytes + seen.bytes, 0)
            self._kept.append(not seen.blank)
            if not seen.blank:
                self.kinds[document.kind] += 1
                digest = seen.digest()
                content.update(digest + document.name.encode(errors="replace") + b"\n")
                split.append(int.from_bytes(digest[:8], "little"))
                sample.append(int.from_bytes(digest[8:], "little"))
                self.bytes, self.characters = self.bytes + seen.bytes, self.characters + seen.characters
        self.empty = self._kept.count(0)
        self.skipped = [entry for source in sources for entry in source.skipped.items()]
        self.formats: Counter[str] = sum((source.formats for source in sources), Counter())
        if not split:
            path, left = self.skipped[0] if self.skipped else ("", None)
            reason = f"{path} is left out: {left.why}" if left else "every document is blank"
            raise DataError(
                f"no text in {', '.join(source.name for source in sources)} ({len(self.skipped)} files left out; "
                f"the first: {reason}); give UTF-8 text that is not empty"
            )
        self.content = content.hexdigest()
        self.split, self.sample = np.array(split, np.uint64), np.array(sample, np.uint64)

    def hasher(self) -> Any:
        """Return a new hash object for the 16-byte hash of a text."""
        return hashlib.blake2b(digest_size=16, salt=(self.seed % 2**64).to_bytes(16, "little"))

    def training_sample(self, held_out: npt.NDArray[np.bool_], sample_bytes: int) -> Iterator[str]:
        """Yield about ``sample_bytes`` of the documents that are not held out, chosen by hash, in order."""
        wanted = min(sample_bytes / self.bytes, 1.0)
        chosen = ~held_out & (self.sample.astype(np.float64) / 2**64 <= wanted)
        if not bool(chosen.any()):
            chosen = ~held_out  # few, large documents
        budget, done = sample_bytes + sample_bytes // 4, 0
        for number, document in self.documents():
            for piece in _texts_of(document):
                if chosen[number] and done < budget:
                    text = piece[: budget - done]
                    done += len(text.encode())
                    self.progress("training the tokenizer", done, min(budget, self.bytes))
                    yield text

    def _read(self, after_source: Callable[[], object] = lambda: None) -> Iterator[Document]:
        for source in self.sources:
            yield from source.documents()
            after_source()

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Read everything again. Raises: DataError if it is not what the survey saw, at the latest at a text's end."""
        number, place = -1, -1
        for place, document in enumerate(self._read()):
            seen = _Seen(self)
            pieces = seen.watch(document)
            if place < len(self._kept) and self._kept[place]:
                number += 1
                yield number, document._replace(pieces=pieces)
            for _ in pieces:  # the rest must be read to complete the hash
                pass
            known = place < len(self._kept) and bool(self._kept[place]) != seen.blank
            if not known or not seen.blank and int.from_bytes(seen.digest()[:8], "little") != int(self.split[number]):
                raise DataError(
                    f"{document.name} changed while it was being read; build again when nothing writes there"
                )
        if place + 1 != len(self._kept):
            raise DataError("documents disappeared while they were being read; build again when nothing writes to them")

    def held_out(self, share: float) -> npt.NDArray[np.bool_]:
        """Choose the documents with the smallest hashes: (documents,) bool."""
        if share == 0 or self.split.size == 1:
            return np.zeros(self.split.size, dtype=bool)
        count = max(round(self.split.size * share), 1)
        chosen = self.split <= np.partition(self.split, count - 1)[count - 1]
        if bool(chosen.all()):
            raise DataError(f"all {self.split.size} documents are the same text; give more text, or held_out 0")
        return chosen


def _texts_of(document: Document) -> Iterable[str]:
    """Return what a tokenizer learns from: of a prompt and its completion the texts, without their JSON."""
    return json.loads(document.text).values() if document.kind == PAIR else document.pieces


class _Seen:
    """Hash and size of a text, updated piece by piece."""

    def __init__(self, survey: Survey) -> None:
        self.bytes = self.characters = 0
        self.blank = True
        self._hasher = survey.hasher()

    def add(self, piece: Any) -> None:
        raw = piece.encode() if isinstance(piece, str) else piece.tobytes()
        self._hasher.update(raw)
        self.bytes, self.characters = self.bytes + len(raw), self.characters + len(piece)
        self.blank = self.blank and isinstance(piece, str) and (not piece or piece.isspace())

    def watch(self, document: Document) -> Iterator[Any]:
        for piece in document.pieces:
            self.add(piece)
            yield piece

    def digest(self) -> bytes:
        return bytes(self._hasher.digest())

"""The documents of a build, read several times but never kept: counts, hashes, the split and the BPE's sample."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from longctx.data.text import Document, Source
from longctx.errors import DataError

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all (0 while unknown)


class Survey:
    """One pass over all documents: how many, how large, and 128 bits of hash of each.

    Attributes:
        bytes, empty, skipped: UTF-8 bytes of all documents, blank documents, files left out and why.
        content: hash of all texts and names, in order.
        split, sample: (documents,) uint64, hashes of (seed, text) that choose held-out documents and the BPE's sample.
        sizes: (documents,) int64, in bytes.

    Raises:
        DataError: no text at all, or a source that cannot be read.
    """

    def __init__(self, sources: list[Source], seed: int, progress: Progress) -> None:
        self.sources, self.seed, self.progress = sources, seed, progress
        self.bytes = self.empty = 0
        split, sample, sizes = array("Q"), array("Q"), array("Q")
        content = hashlib.sha256()
        for document in self._read():
            digest = self.digest(document.text)
            content.update(digest + document.name.encode(errors="replace") + b"\n")
            split.append(int.from_bytes(digest[:8], "little"))
            sample.append(int.from_bytes(digest[8:], "little"))
            sizes.append(len(document.text.encode()))
            self.bytes += sizes[-1]
            progress("reading", self.bytes, 0)
        self.skipped = {name: why for source in sources for name, why in source.skipped.items()}
        if not split:
            reason = next(iter(self.skipped.values()), "every document is blank")
            raise DataError(
                f"no text in {', '.join(getattr(s, 'name', None) or str(getattr(s, 'root', s)) for s in sources)} "
                f"({len(self.skipped)} files left out; the first: {reason}); give UTF-8 text that is not empty"
            )
        self.content = content.hexdigest()
        self.split, self.sample = np.array(split, np.uint64), np.array(sample, np.uint64)
        self.sizes = np.array(sizes, np.int64)

    def digest(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode(), digest_size=16, salt=(self.seed % 2**64).to_bytes(16, "little")).digest()

    def training_sample(self, held_out: npt.NDArray[np.bool_], sample_bytes: int) -> Iterator[str]:
        """Yield about ``sample_bytes`` of the documents that are not held out, chosen by hash, in order."""
        wanted = min(sample_bytes / self.bytes, 1.0)
        chosen = ~held_out & (self.sample.astype(np.float64) / 2**64 <= wanted)
        if not bool(chosen.any()):
            chosen = ~held_out  # few, large documents
        budget, done = sample_bytes + sample_bytes // 4, 0
        for number, document in self.documents():
            if chosen[number] and done < budget:
                text = document.text[: budget - done]
                done += len(text.encode())
                self.progress("training the tokenizer", done, min(budget, self.bytes))
                yield text

    def _read(self) -> Iterator[Document]:
        self.empty = 0
        for source in self.sources:
            for document in source.documents():
                if document.text and not document.text.isspace():
                    yield document
                else:
                    self.empty += 1

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Read everything again. Raises: DataError if it is not what the survey saw."""
        number = -1
        for number, document in enumerate(self._read()):
            digest = self.digest(document.text)
            if number >= self.split.size or int.from_bytes(digest[:8], "little") != int(self.split[number]):
                raise DataError(
                    f"{document.name} changed while it was being read; build again when nothing writes there"
                )
            yield number, document
        if number + 1 != self.split.size:
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

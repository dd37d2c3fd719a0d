"""Packing: assign pieces of documents to rows of ``sequence_length`` tokens.

``concat`` splits the file every ``sequence_length`` tokens: nothing to compute, but documents are split anywhere.
``best_fit`` splits only documents longer than a row, and packs the rest by best-fit decreasing (arXiv 2404.10830):
a document that fits is never split. In both, each token of the file is in exactly one row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from longctx.errors import DataError

PACKINGS = ("concat", "best_fit")
LONG = ("split", "truncate", "drop")
"""of best_fit: what is done with a document longer than a row"""

Int64 = npt.NDArray[np.int64]


class Pieces(NamedTuple):
    """The pieces of one row, in order; each array is (pieces,) int64."""

    starts: Int64  # first token, as an index into the file
    lengths: Int64
    documents: Int64  # index of the document in the file

    @property
    def fill(self) -> int:
        """Tokens in the row; the rest is padding."""
        return int(self.lengths.sum())


class Packing(Protocol):
    """Random access to the rows of one file."""

    rows: int
    tokens: int
    """in all rows"""

    def pieces(self, row: int) -> Pieces:
        """Return the pieces of a row, ``0 <= row < rows``."""
        ...


def pack(offsets: Int64, sequence_length: int, method: str = "best_fit", long: str = "split") -> Packing:
    """Assign the documents of a file to rows.

    Args:
        offsets: (documents + 1,) int64, as in ``TokenStore.offsets``.
        sequence_length: tokens in a row.
        method: "concat" or "best_fit".
        long: what is done with documents longer than a row; "split": a row for each piece; with best_fit also
            "truncate": one row with their first tokens, "drop": none.

    Raises:
        DataError: unknown method or ``long``, or rows too short for a token and its label.
    """
    if sequence_length < 2:
        raise DataError(f"sequence_length {sequence_length}: a row needs at least 2 tokens to predict one from another")
    if long not in LONG or (method == "concat" and long != "split"):
        raise DataError(f"long_documents {long!r} with packing {method!r}: use 'split', or best_fit with one of {LONG}")
    if method == "concat":
        return ConcatPacking(offsets, sequence_length)
    if method == "best_fit":
        return BestFitPacking(offsets, sequence_length, long)
    raise DataError(f"packing {method!r} is unknown; use one of {', '.join(map(repr, PACKINGS))}")


class ConcatPacking:
    """Row i is tokens i·S to (i + 1)·S of the file; the last row may be short. Constant memory."""

    def __init__(self, offsets: Int64, sequence_length: int) -> None:
        self.offsets, self.sequence_length = offsets, sequence_length
        self.tokens = int(offsets[-1])
        self.rows = -(-self.tokens // sequence_length)

    def pieces(self, row: int) -> Pieces:
        begin = row * self.sequence_length
        end = min(begin + self.sequence_length, self.tokens)
        first = int(np.searchsorted(self.offsets, begin, side="right")) - 1
        last = int(np.searchsorted(self.offsets, end, side="left"))  # documents first … last − 1 touch the row
        bounds = np.clip(self.offsets[first : last + 1], begin, end)
        return Pieces(bounds[:-1], np.diff(bounds), np.arange(first, last, dtype=np.int64))


class BestFitPacking:
    """Rows of whole documents, and of pieces of documents longer than a row. 24 bytes of memory per piece."""

    def __init__(self, offsets: Int64, sequence_length: int, long: str = "split") -> None:
        lengths = np.diff(offsets)
        if bool((lengths < 1).any()):
            document = int(np.argmin(lengths))
            raise DataError(f"document {document} has {int(lengths[document])} tokens: the document index is damaged")
        pieces_of = -(-lengths // sequence_length)
        if long != "split":
            pieces_of = (lengths <= sequence_length).astype(np.int64) if long == "drop" else np.minimum(pieces_of, 1)
        documents = np.repeat(np.arange(lengths.size, dtype=np.int64), pieces_of)
        first_piece = np.cumsum(pieces_of) - pieces_of
        inside = np.arange(documents.size, dtype=np.int64) - first_piece[documents]  # which piece of its document
        starts = offsets[documents] + inside * sequence_length
        piece_lengths = np.minimum(offsets[documents + 1] - starts, sequence_length)
        self.tokens = int(piece_lengths.sum())
        row, self.rows = best_fit(piece_lengths, sequence_length)
        _, first = np.unique(row, return_index=True)
        row = np.argsort(np.argsort(first))[row]  # number rows by their first token in the file
        order = np.argsort(row, kind="stable")  # pieces of a row keep the order of the file
        self._starts, self._lengths, self._documents = starts[order], piece_lengths[order], documents[order]
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=self.rows))])

    def pieces(self, row: int) -> Pieces:
        here = slice(int(self._bounds[row]), int(self._bounds[row + 1]))
        return Pieces(self._starts[here], self._lengths[here], self._documents[here])


def longer_than_row(offsets: Int64, sequence_length: int) -> tuple[int, int, int]:
    """Return how many documents are longer than a row, their tokens, and how many of these do not fit into one."""
    lengths = np.diff(offsets)
    long = lengths[lengths > sequence_length]
    return int(long.size), int(long.sum()), int((long - sequence_length).sum())


def best_fit(lengths: Int64, capacity: int) -> tuple[Int64, int]:
    """Best-fit decreasing bin packing: longest piece first, each into the fullest row with enough room.

    Pieces of one length and rows with one amount of room are handled together, so the cost follows the number of
    distinct lengths rather than the number of pieces.

    Args:
        lengths: (n,) int64, each from 1 to ``capacity``.

    Returns:
        (n,) int64, the row of each piece, and the number of rows.
    """
    result = np.empty(lengths.size, dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    room: dict[int, list[Int64]] = {}  # room left -> rows that have it
    rooms: list[int] = []  # its keys, sorted
    rows = done = 0

    def leave(left: int, which: Int64) -> None:
        """Record that the rows `which` have room for `left` more tokens."""
        if left > 0 and which.size:
            if left not in room:
                room[left] = []
                insort(rooms, left)
            room[left].append(which)

    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            index = bisect_left(rooms, length)
            if index < len(rooms):  # all rows with the least room that suffices
                left = rooms.pop(index)
                found = room.pop(left)
                candidates = found[0] if len(found) == 1 else np.concatenate(found)
            else:  # no row has enough: open as many as this length needs
                left = capacity
                needed = -(-count // (capacity // length))
                candidates = np.arange(rows, rows + needed, dtype=np.int64)
                rows += needed
            per_row = left // length  # a row that got a piece is now the fullest with room, so it gets more of them
            used = candidates[: -(-count // per_row)]
            placed = min(count, used.size * per_row)
            result[longest_first[done : done + placed]] = np.repeat(used, per_row)[:placed]
            in_last = placed - (used.size - 1) * per_row
            leave(left, candidates[used.size :])  # got none
            leave(left - per_row * length, used[:-1])  # full for this length
            leave(left - in_last * length, used[-1:])  # got what was left over
            done += placed
            count -= placed
    return result, rows

"""ShardedLoader: windows of local micro-batches; each rank reads only its own shard of each row.

Sample n of a run is always the same row, and its position in a window is a fixed function of n: samples are assigned to
micro-batches first, then to data replicas, then to rows of a micro-batch. The number of samples consumed is the only
state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from longctx.data.order import SampleOrder
from longctx.data.prefetch import Prefetcher
from longctx.data.rows import Files, PackedRows, Part, empty_part
from longctx.errors import DataError
from longctx.layout import Layout, get_layout

Window = list[dict[str, Any]]


class Grid(Protocol):
    """The part of ``longctx.Mesh`` that the loader uses."""

    ring_size: int
    ring_rank: int
    ulysses_size: int
    ulysses_rank: int
    data_size: int
    data_rank: int


class _OneRank:
    ring_size = ulysses_size = data_size = 1
    ring_rank = ulysses_rank = data_rank = 0


def local_positions(
    sequence_length: int, mesh: Grid | None = None, layout: str | Layout = "zigzag"
) -> npt.NDArray[np.int64]:
    """Return the (T,) int64 positions of the padded row that this rank holds, in local order."""
    mesh = mesh or _OneRank()
    layout = get_layout(layout)
    padded = layout.padded_length(sequence_length, mesh.ring_size, mesh.ulysses_size)
    spans = layout.member_spans(mesh.ring_rank, mesh.ring_size, mesh.ulysses_rank, mesh.ulysses_size, padded)
    return np.concatenate([span.start + span.stride * np.arange(span.count, dtype=np.int64) for span in spans])


def micro_batch_of(parts: list[Part]) -> dict[str, Any]:
    """Stack shards of rows into the keyword arguments of a model's forward."""
    stacked = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*parts, strict=True)]
    input_ids, position_ids, document_ids, labels = stacked
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "document_ids": document_ids,
        "labels": labels,
        "shift_labels": labels,
        "use_cache": False,
    }


class _Reader:
    """Reads any window for one rank; stateless. The prefetching thread references this and never the loader."""

    def __init__(
        self,
        rows: PackedRows,
        order: SampleOrder,
        mesh: Grid,
        positions: npt.NDArray[np.int64],
        micro_batch: int,
        accumulation: int,
    ) -> None:
        self.rows, self.order, self.mesh, self.positions = rows, order, mesh, positions
        self.shape = (accumulation, mesh.data_size, micro_batch)
        self.samples_per_window = accumulation * mesh.data_size * micro_batch

    def sample_ids(self, samples_consumed: int) -> npt.NDArray[np.int64]:
        numbers = samples_consumed + np.arange(self.samples_per_window, dtype=np.int64)
        return self.order(numbers).reshape(self.shape)

    def window(self, samples_consumed: int) -> Window:
        self.rows.check_unchanged()
        mine = self.sample_ids(samples_consumed)[:, self.mesh.data_rank]
        return [
            {
                **micro_batch_of([self.rows.read(int(row), self.positions) for row in rows]),
                "row_ids": torch.from_numpy(rows.copy()),
            }
            for rows in mine
        ]

    def windows(self, samples_consumed: int) -> Iterator[Window]:
        while True:
            yield self.window(samples_consumed)
            samples_consumed += self.samples_per_window


class ShardedLoader:
    """Endless windows of training data; one window is the data of one optimizer step.

    A window is a list of ``accumulation`` local micro-batches, each a dict of ``input_ids``, ``position_ids`` (B, T)
    int64, ``document_ids`` (B, T) int32 (-1 at pads), ``labels`` and ``shift_labels`` (B, T) int64 (one tensor:
    the next token of the same document, -100 if there is none), ``row_ids`` (B,) int64, with which ``engine.weigh``
    verifies that the ranks of a ring read the same rows, and ``use_cache=False``; B is ``micro_batch``, T is the padded
    sequence length over ring · ulysses, the same on every rank.

    Args:
        files: token file(s): paths or opened stores.
        sequence_length: tokens per row over all ranks, before padding.
        micro_batch, accumulation: rows of a micro-batch on one data replica, micro-batches of a window.
        mesh: a ``longctx.Mesh``; None for one rank.
        layout: "zigzag", "contiguous" or "striped".
        seed: of the order of samples.
        packing: "best_fit" or "concat".
        samples_consumed: where to begin, counted over all data replicas; valid for any mesh.
        tokenizer_hash, vocabulary_size: of the run; files that do not match are rejected.
        prefetch: windows read ahead by a thread; 0: read in the calling thread.
        shuffle: False reads rows in file order.

    Raises:
        DataError: invalid files, sizes or position.
    """

    def __init__(
        self,
        files: Files,
        sequence_length: int,
        *,
        micro_batch: int = 1,
        accumulation: int = 1,
        mesh: Grid | None = None,
        layout: str | Layout = "zigzag",
        seed: int = 0,
        packing: str = "best_fit",
        samples_consumed: int = 0,
        tokenizer_hash: str | None = None,
        vocabulary_size: int | None = None,
        prefetch: int = 2,
        shuffle: bool = True,
    ) -> None:
        for name, value, least in (
            ("micro_batch", micro_batch, 1),
            ("accumulation", accumulation, 1),
            ("samples_consumed", samples_consumed, 0),
            ("prefetch", prefetch, 0),
        ):
            if value < least:
                raise DataError(f"{name} {value}: must be at least {least}")
        self.mesh = mesh or _OneRank()
        self.rows = PackedRows(
            files, sequence_length, packing, tokenizer_hash=tokenizer_hash, vocabulary_size=vocabulary_size
        )
        self.order = SampleOrder(len(self.rows), seed, shuffle)
        positions = local_positions(sequence_length, self.mesh, layout)
        self._reader = _Reader(self.rows, self.order, self.mesh, positions, micro_batch, accumulation)
        self.micro_batch, self.accumulation, self.seed = micro_batch, accumulation, seed
        self.samples_per_window = self._reader.samples_per_window
        self.tokens_per_window = self.samples_per_window * sequence_length  # pads included
        self._consumed = samples_consumed
        self._depth = prefetch
        self._ahead: Prefetcher[Window] | None = None

    # -- position ------------------------------------------------------------------------------------------------

    @property
    def samples_consumed(self) -> int:
        """Samples yielded so far, over all data replicas; with the seed, the loader's entire state."""
        return self._consumed

    @property
    def epoch(self) -> float:
        """Epochs completed so far."""
        return self._consumed / len(self.rows)

    def sample_ids(self, samples_consumed: int) -> npt.NDArray[np.int64]:
        """Return the rows of the window at ``samples_consumed``: (accumulation, replicas, micro_batch) int64.

        Equal on every rank; flattened, it is the order of samples, which does not depend on the mesh.
        """
        return self._reader.sample_ids(samples_consumed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: samples consumed, the seed, and the identity of the data."""
        return {"samples_consumed": self._consumed, "seed": self.seed, "data": self.rows.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at ``state``, on any number of ranks.

        Raises:
            DataError: the state is of other data, another packing or another seed.
        """
        for name, ours in (("data", self.rows.identity), ("seed", self.seed)):
            if state[name] != ours:
                raise DataError(
                    f"cannot continue: the checkpoint counted samples of {name} {state[name]!r}, this run has "
                    f"{ours!r}; "
                    "use the same files, packing, sequence_length and seed, or start a new run"
                )
        self.seek(int(state["samples_consumed"]))

    def seek(self, samples_consumed: int) -> None:
        """Resume after that many samples; drop windows that were read ahead."""
        if samples_consumed < 0:
            raise DataError(f"samples_consumed {samples_consumed}: must be at least 0")
        self.close()
        self._consumed = samples_consumed

    # -- iteration ------------------------------------------------------------------------------------------------

    def window(self, samples_consumed: int) -> Window:
        """Read this rank's shard of the window that begins at ``samples_consumed``; stateless."""
        return self._reader.window(samples_consumed)

    def __iter__(self) -> Iterator[Window]:
        return self

    def __next__(self) -> Window:
        if self._depth == 0:
            window = self.window(self._consumed)
        else:
            if self._ahead is None:
                self._ahead = Prefetcher(self._reader.windows(self._consumed), self._depth)
            window = next(self._ahead)
        self._consumed += self.samples_per_window
        return window

    def close(self) -> None:
        """Stop the prefetching thread, if any; iteration can continue afterwards."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __enter__(self) -> ShardedLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EvaluationLoader:
    """Held-out rows in a fixed order, once per iteration; every rank of the mesh gets the same number of micro-batches.

    If the rows do not divide evenly, the last micro-batches are filled with rows of padding without labels, so that no
    replica is missing from a collective. It can be iterated repeatedly, and yields windows of one micro-batch.

    Args:
        files, sequence_length, micro_batch, mesh, layout, packing, tokenizer_hash, vocabulary_size: as ShardedLoader.
        max_rows: evaluate at most this many rows, evenly spread over the data; None: all.
    """

    def __init__(
        self,
        files: Files,
        sequence_length: int,
        *,
        micro_batch: int = 1,
        mesh: Grid | None = None,
        layout: str | Layout = "zigzag",
        packing: str = "best_fit",
        max_rows: int | None = None,
        tokenizer_hash: str | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        if micro_batch < 1 or (max_rows is not None and max_rows < 1):
            raise DataError(f"micro_batch {micro_batch} and max_rows {max_rows}: must be at least 1")
        self.mesh = mesh or _OneRank()
        self.rows = PackedRows(
            files, sequence_length, packing, tokenizer_hash=tokenizer_hash, vocabulary_size=vocabulary_size
        )
        self.micro_batch = micro_batch
        count = min(len(self.rows), max_rows or len(self.rows))
        self.row_ids = np.arange(count, dtype=np.int64) * len(self.rows) // count
        self._positions = local_positions(sequence_length, self.mesh, layout)

    def __len__(self) -> int:
        """Windows of one pass, the same on every rank."""
        return -(-self.row_ids.size // (self.mesh.data_size * self.micro_batch))

    def __iter__(self) -> Iterator[Window]:
        self.rows.check_unchanged()
        for step in range(len(self)):
            first = (step * self.mesh.data_size + self.mesh.data_rank) * self.micro_batch
            mine = self.row_ids[first : first + self.micro_batch]
            parts = [self.rows.read(int(row), self._positions) for row in mine]
            parts += [empty_part(self._positions.size)] * (self.micro_batch - len(parts))
            yield [micro_batch_of(parts)]

"""ShardedLoader: accumulation windows of local micro-batches; each rank reads only its own shard of each row.

Sample n of a run is always the same row of the data, and its position in an accumulation window is a fixed function of
n: samples are assigned to micro-batches first, then to data replicas, then to rows of a micro-batch. The number of
samples consumed is the only state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from longctx.data.mixture import MixedOrder
from longctx.data.order import SampleOrder
from longctx.data.prefetch import Prefetcher
from longctx.data.rows import Files, PackedRows, empty_part
from longctx.data.windows import Grid, OneRank, Window, WindowReader, local_positions, micro_batch_of
from longctx.errors import DataError
from longctx.layout import Layout


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
        long_documents: what "best_fit" does with documents longer than a row: "split", "truncate" or "drop".
        samples_consumed: where to begin, counted over all data replicas; valid for any mesh.
        tokenizer_hash, vocabulary_size: of the run; files that do not match are rejected.
        prefetch: windows read ahead by a thread; 0: read in the calling thread.
        shuffle: False reads rows in file order.
        weights: share of each source of the files in the samples (mixture.py); None: all rows are one data set.
        repeat: False ends the iteration before any row (of any source) is read a second time.

    Raises:
        DataError: invalid files, sizes, position or weights.
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
        long_documents: str = "split",
        samples_consumed: int = 0,
        tokenizer_hash: str | None = None,
        vocabulary_size: int | None = None,
        prefetch: int = 2,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        repeat: bool = True,
    ) -> None:
        for name, value, least in (
            ("micro_batch", micro_batch, 1),
            ("accumulation", accumulation, 1),
            ("samples_consumed", samples_consumed, 0),
            ("prefetch", prefetch, 0),
        ):
            if value < least:
                raise DataError(f"{name} {value}: must be at least {least}")
        self.mesh = mesh or OneRank()
        self.rows = PackedRows(
            files,
            sequence_length,
            packing,
            long_documents=long_documents,
            by_source=weights is not None,
            tokenizer_hash=tokenizer_hash,
            vocabulary_size=vocabulary_size,
        )
        self.weights = weights
        self.order: SampleOrder | MixedOrder
        if weights is None:
            self.order = SampleOrder(len(self.rows), seed, shuffle)
        else:
            for name, rows in self.rows.sources:
                if rows == 0:
                    raise DataError(
                        f"{name}: none of its documents is in the training data; give more, or leave it out"
                    )
            self.order = MixedOrder([rows for _, rows in self.rows.sources], weights, seed, shuffle)
        self.last_sample = None if repeat else self.order.until_repeated()
        positions = local_positions(sequence_length, self.mesh, layout)
        self._reader = WindowReader(self.rows, self.order, self.mesh, positions, micro_batch, accumulation)
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
        """Passes over the data so far, a fraction."""
        return self._consumed / len(self.rows)

    @property
    def identity(self) -> str:
        """Text that changes with the data and with the shares of its sources."""
        return (
            self.rows.identity if self.weights is None else f"{self.rows.identity}:{','.join(map(repr, self.weights))}"
        )

    @property
    def windows_in_all(self) -> int | None:
        """Windows from sample 0 until no row would be new; None: endless."""
        return None if self.last_sample is None else self.last_sample // self.samples_per_window

    def mixture(self, samples_consumed: int) -> list[dict[str, Any]]:
        """Return of each weighted source its name, weight, rows, and samples and epochs up to ``samples_consumed``."""
        if not isinstance(self.order, MixedOrder):
            return []
        assert self.weights is not None
        return [
            {"source": name, "weight": weight, "rows": rows, "samples": samples, "epochs": samples / rows}
            for (name, rows), weight, samples in zip(
                self.rows.sources, self.weights, self.order.counts(samples_consumed), strict=True
            )
        ]

    def row_ids(self, samples_consumed: int) -> npt.NDArray[np.int64]:
        """Return the row number of each sample of the window at ``samples_consumed``: (accumulation, replicas,
        micro_batch) int64.

        Equal on every rank; flattened, it is the order of samples, which does not depend on the mesh.
        """
        return self._reader.row_ids(samples_consumed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: samples consumed, the seed, and the identity of the data."""
        return {"samples_consumed": self._consumed, "seed": self.seed, "data": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at ``state``, on any number of ranks.

        Raises:
            DataError: the state is of other data, another packing or another seed.
        """
        for name, ours in (("data", self.identity), ("seed", self.seed)):
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
        if self.last_sample is not None and self._consumed + self.samples_per_window > self.last_sample:
            raise StopIteration
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
        files, sequence_length, micro_batch, mesh, layout, packing, long_documents, tokenizer_hash, vocabulary_size: as
            ShardedLoader.
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
        long_documents: str = "split",
        max_rows: int | None = None,
        tokenizer_hash: str | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        if micro_batch < 1 or (max_rows is not None and max_rows < 1):
            raise DataError(f"micro_batch {micro_batch} and max_rows {max_rows}: must be at least 1")
        self.mesh = mesh or OneRank()
        self.rows = PackedRows(
            files,
            sequence_length,
            packing,
            long_documents=long_documents,
            tokenizer_hash=tokenizer_hash,
            vocabulary_size=vocabulary_size,
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

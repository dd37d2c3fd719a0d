"""Accumulation windows of one rank's micro-batches, read from packed rows: the stateless part of the loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from longctx.data.mixture import MixedOrder
from longctx.data.order import SampleOrder
from longctx.data.rows import PackedRows, Part
from longctx.layout import Layout, get_layout

Window = list[dict[str, Any]]


class Grid(Protocol):
    """The part of ``longctx.Mesh``, the grid of ranks, that the loader uses."""

    ring_size: int
    ring_rank: int
    ulysses_size: int
    ulysses_rank: int
    data_size: int
    data_rank: int


class OneRank:
    """The mesh of one rank."""

    ring_size = ulysses_size = data_size = 1
    ring_rank = ulysses_rank = data_rank = 0


def local_positions(
    sequence_length: int, mesh: Grid | None = None, layout: str | Layout = "zigzag"
) -> npt.NDArray[np.int64]:
    """Return the (T,) int64 positions of the padded row that this rank holds, in local order."""
    mesh = mesh or OneRank()
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


class WindowReader:
    """Reads any window for one rank; stateless. The prefetching thread references this and never the loader."""

    def __init__(
        self,
        rows: PackedRows,
        order: SampleOrder | MixedOrder,
        mesh: Grid,
        positions: npt.NDArray[np.int64],
        micro_batch: int,
        accumulation: int,
    ) -> None:
        self.rows, self.order, self.mesh, self.positions = rows, order, mesh, positions
        self.shape = (accumulation, mesh.data_size, micro_batch)
        self.samples_per_window = accumulation * mesh.data_size * micro_batch

    def row_ids(self, samples_consumed: int) -> npt.NDArray[np.int64]:
        numbers = samples_consumed + np.arange(self.samples_per_window, dtype=np.int64)
        return self.order(numbers).reshape(self.shape)

    def window(self, samples_consumed: int) -> Window:
        self.rows.check_unchanged()
        mine = self.row_ids(samples_consumed)[:, self.mesh.data_rank]
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

"""The loaders of longctx.hf split rows over data replicas, in an order that depends on seed and epoch only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_tiny import clean_state

from longctx.hf.loaders import EpochSampler, Loaders


def rows_read(replica: int, replicas: int, **keywords: Any) -> list[list[int]]:
    from accelerate import Accelerator

    clean_state()
    loaders = Loaders()
    loaders.mesh = SimpleNamespace(data_size=replicas, data_rank=replica)  # type: ignore[assignment]
    accelerator = Accelerator(cpu=True)
    loaders.share_rows(accelerator)
    loader = accelerator.prepare(torch.utils.data.DataLoader(range(10), **keywords))  # type: ignore[arg-type]
    return [batch.tolist() for batch in loader]


def test_replicas_read_different_rows() -> None:
    assert rows_read(0, 2, batch_size=2) == [[0, 1], [4, 5], [8, 9]]
    assert rows_read(1, 2, batch_size=2) == [[2, 3], [6, 7], [0, 1]]  # filled up, as accelerate does
    assert rows_read(0, 1, batch_size=4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("replicas", [1, 2])
def test_shuffled_rows_are_read_once(replicas: int) -> None:
    found = [row for i in range(replicas) for b in rows_read(i, replicas, batch_size=1, shuffle=True) for row in b]
    assert sorted(found) == list(range(10))


def test_an_epoch_s_order_depends_on_seed_and_epoch() -> None:
    def orders(seed: int, epochs: list[int]) -> list[list[int]]:
        sampler = EpochSampler(torch.utils.data.RandomSampler(range(20)), seed)  # type: ignore[arg-type]
        found = []
        for epoch in epochs:
            sampler.set_epoch(epoch)
            torch.rand(3)  # the global generator does not matter
            found.append(list(sampler))
        return found

    first, second = orders(7, [0, 1])
    assert first != second and sorted(first) == sorted(second) == list(range(20))
    assert orders(7, [1]) == [second] and orders(8, [0]) != [first]
    assert len(EpochSampler(torch.utils.data.RandomSampler(range(20)), 0)) == 20  # type: ignore[arg-type]

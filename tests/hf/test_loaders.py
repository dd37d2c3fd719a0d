"""The order of a trainer's rows is a function of seed and epoch, the same on every rank whatever it drew before."""

from __future__ import annotations

import torch
from torch.utils.data import RandomSampler

from longctx.hf.loaders import EpochSampler


def order(seed: int, epochs: int, first: int = 0) -> list[list[int]]:
    sampler = EpochSampler(RandomSampler(range(50)), seed)
    sampler.set_epoch(first)
    return [list(sampler) for _ in range(epochs)]


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    one, two = order(3, 2)
    torch.rand(7)  # a rank that has drawn other numbers
    assert order(3, 2) == [one, two]
    assert sorted(one) == sorted(two) == list(range(50)) and one != two
    assert order(4, 1) != [one]


def test_a_resumed_epoch_has_its_own_order() -> None:
    assert order(3, 1, first=1) == order(3, 2)[1:]


def test_the_length_is_that_of_the_sampler() -> None:
    assert len(EpochSampler(RandomSampler(range(50)), 0)) == 50

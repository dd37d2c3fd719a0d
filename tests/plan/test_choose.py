"""The automatic choice: within 5 % of the best of all settings, in under a second."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from longctx.errors import ConfigError
from longctx.plan.choose import choose, enumerate_all
from longctx.plan.limit import fits
from longctx.plan.machines import MACHINES
from longctx.plan.shape import ModelShape

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)
LLAMA_70B = ModelShape(8192, 80, 64, 8, 128, 28672, 128256)
SMALL = ModelShape(2048, 20, 32, 8, 64, 5504, 32768)
NEAR = 0.95


@pytest.mark.parametrize(
    ("shape", "tokens", "machine", "world"),
    [
        (LLAMA_8B, 2**17, "h100", 8),
        (LLAMA_8B, 2**20, "h100", 8),
        (LLAMA_8B, 2**20, "a100", 64),
        (LLAMA_8B, 2**23, "h200", 32),
        (LLAMA_70B, 2**15, "b200", 128),  # takes a copy of the weights in every node
        (SMALL, 2**16, "h100", 1),
        (replace(SMALL, heads=12, kv_heads=3), 2**15, "mi300x", 4),
    ],
)
def test_nothing_is_much_faster(shape: ModelShape, tokens: int, machine: str, world: int) -> None:
    device = MACHINES[machine]
    chosen = choose(shape, tokens, device, world)
    assert fits(shape, chosen.setup, device) and chosen.setup.world == world
    everything = enumerate_all(shape, tokens, device, world, tiles=(None, 4096))
    best = max(everything, key=lambda choice: choice.tokens_per_second)
    assert chosen.tokens_per_second >= NEAR * best.tokens_per_second, (chosen.yaml, best.yaml)


@pytest.mark.slow
def test_nothing_is_much_faster_with_tiles_of_any_size() -> None:
    for tokens, world in ((2**17, 1), (2**20, 8), (2**22, 64)):
        chosen = choose(SMALL, tokens, MACHINES["h100"], world)
        best = max(choice.tokens_per_second for choice in enumerate_all(SMALL, tokens, MACHINES["h100"], world))
        assert chosen.tokens_per_second >= NEAR * best


def test_a_choice_takes_less_than_a_second() -> None:
    times = []
    for _ in range(3):
        began = time.process_time()
        choose(LLAMA_8B, 2**24, MACHINES["h200"], 1024)
        times.append(time.process_time() - began)
    assert min(times) < 1


def test_what_is_chosen_says_how_to_write_it() -> None:
    chosen = choose(LLAMA_8B, 2**20, MACHINES["h100"], 64, ulysses=False)
    assert chosen.setup.ulysses == 1 and chosen.yaml["mesh.ring"] == chosen.setup.ring
    hybrid = choose(LLAMA_8B, 2**20, MACHINES["h100"], 512)
    assert 1 < hybrid.setup.ulysses <= 8, "few tokens per rank: Ulysses within the node, a ring between nodes"
    with pytest.raises(ConfigError, match="no settings fit"):
        choose(LLAMA_8B, 2**24, MACHINES["h100"], 1)

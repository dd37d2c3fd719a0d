"""The longest row that fits, and what would make it longer."""

from __future__ import annotations

from dataclasses import replace

from longctx.plan.limit import fits, further, longest
from longctx.plan.machines import MACHINES
from longctx.plan.memory import host_bytes, peak_bytes
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)
H100 = MACHINES["h100"]


def test_the_longest_sequence_fits_and_a_longer_one_does_not() -> None:
    setup = Setup(2**20, ring=8, recompute="layer_keep_attention", loss_tile=2048, mlp_tile=4096)
    best = longest(LLAMA_8B, setup, H100)
    assert fits(LLAMA_8B, replace(setup, tokens=best), H100)
    assert not fits(LLAMA_8B, replace(setup, tokens=int(best * 1.01)), H100)
    assert longest(LLAMA_8B, replace(setup, stage=0), H100) == 0
    for change in further(LLAMA_8B, setup, H100):
        assert change.longest > best, change


def test_it_fits_up_to_the_last_byte_of_the_device_and_nine_tenths_of_the_host() -> None:
    setup = Setup(2**18, ring=8, recompute="layer", offload_optimizer=True, offload_checkpoints=True)
    peak, host = peak_bytes(LLAMA_8B, setup), 8 * sum(host_bytes(LLAMA_8B, setup).values())
    exact = replace(H100, memory=peak + H100.reserved, host=host * 10 // 9 + 1)
    assert fits(LLAMA_8B, setup, exact)
    assert not fits(LLAMA_8B, setup, replace(exact, memory=exact.memory - 1))
    assert not fits(LLAMA_8B, setup, replace(exact, host=host * 10 // 9 - 1))


def test_the_best_switch_comes_first_and_none_that_is_set_is_offered() -> None:
    setup = Setup(2**20, ring=8, recompute="mlp", stage=2)
    found = further(LLAMA_8B, setup, H100)
    assert [change.longest for change in found] == sorted((change.longest for change in found), reverse=True)
    assert "zero.stage: 3" in [change.what for change in found]
    best = replace(
        setup, stage=3, recompute="layer_keep_attention", recompute_norms=True, offload_checkpoints=True, mlp_tile=2048,
        loss_tile=1040, offload_optimizer=True, bucket=50_000_000, live=100_000_000,
    )  # fmt: skip
    left = {change.what.partition(":")[0] for change in further(LLAMA_8B, best, H100)}
    assert left <= {"mesh.ring", "memory.recompute"}, left

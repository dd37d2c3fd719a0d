"""Buffers beside tensors of the same shapes and dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longctx.plan import buffers
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape

SHAPE = ModelShape(hidden=64, layers=2, heads=8, kv_heads=2, head_dim=16, inner=96, vocab=1000)
SETUP = Setup(4096, ring=4, rows=2)
N = 2048  # tokens per rank
FULL = torch.float32


def size(*shape: int, dtype: torch.dtype = torch.bfloat16, count: int = 1) -> int:
    return count * torch.empty(shape, dtype=dtype, device="meta").nbytes


@pytest.mark.parametrize(("ring", "blocks", "gradients"), [(1, 0, 1), (2, 1, 3), (3, 2, 3), (8, 2, 3)])
def test_a_ring_holds_at_most_two_blocks_and_three_gradients(ring: int, blocks: int, gradients: int) -> None:
    setup = Setup(N * ring, ring=ring)
    block = size(2, 2, N, 16)
    assert buffers.kv_block(SHAPE, setup) == block
    assert buffers.ring_forward(SHAPE, setup) == blocks * block
    assert buffers.ring_backward(SHAPE, setup) == blocks * block + size(gradients, 2, 2, N, 16, dtype=FULL)


def test_attentions_backward() -> None:
    q, q32, statistics = size(8, N, 16), size(8, N, 16, dtype=FULL), size(2, 8, N, dtype=FULL)
    assert buffers.attention_backward(SHAPE, replace(SETUP, on_gpu=False)) == q + q32 + statistics + q  # dq rounded
    assert buffers.attention_backward(SHAPE, SETUP) == q + q32 + statistics, "dq fits into the ring's free buffers"
    alone = Setup(N, on_gpu=True)  # no ring, no free buffers
    assert buffers.attention_backward(SHAPE, alone) == q + q32 + statistics + q
    wide = replace(SHAPE, itemsize=4)
    assert buffers.attention_backward(wide, SETUP) == 2 * q32 + statistics, "fp32 has nothing to round"


def test_an_all_to_all_holds_both_sides() -> None:
    assert buffers.ulysses_buffers(SHAPE, SETUP) == 0
    setup = Setup(4096, ulysses=2, rows=1)
    assert buffers.ulysses_buffers(SHAPE, setup) == 2 * (size(2, 8, N, 16) + size(2, 2, N, 16))
    copied = replace(setup, ulysses=4, tokens=4 * N)  # two key heads for four members
    assert buffers.ulysses_buffers(SHAPE, copied) == 2 * (size(2, 8, N, 16) + size(2, 4, N, 16))


def test_an_mlps_tile() -> None:
    inner = size(N, 96)
    assert buffers.mlp_tile_bytes(SHAPE, SETUP) == 2 * inner, "its intermediates are saved activations"
    assert buffers.mlp_tile_bytes(SHAPE, replace(SETUP, recompute="layer")) == (4 + 2) * inner
    assert buffers.mlp_tile_bytes(SHAPE, replace(SETUP, recompute="mlp")) == 4 * inner, "gradients overwrite them"
    assert buffers.mlp_tile_bytes(SHAPE, replace(SETUP, mlp_tile=128)) == 4 * size(128, 96)
    assert buffers.mlp_tile_bytes(SHAPE, replace(SETUP, mlp_tile=10**6)) == 4 * inner, "a tile is at most all tokens"
    plain = replace(SHAPE, gated=False)
    assert buffers.mlp_tile_bytes(plain, replace(SETUP, recompute="mlp")) == (5 + 2) * inner


def test_an_mlps_gradients() -> None:
    assert buffers.mlp_gradient_bytes(SHAPE, SETUP) == size(64, 96)
    tiled = replace(SETUP, mlp_tile=128)
    assert buffers.mlp_gradient_bytes(SHAPE, tiled) == size(3, 64, 96) + size(3, 64, 96, dtype=FULL)


def test_logits() -> None:
    hidden = size(N, 64)
    assert buffers.loss_tile_bytes(SHAPE, SETUP) == size(3, N, 1000, dtype=FULL)
    assert buffers.loss_gradient_bytes(SHAPE, SETUP) == hidden
    tiled = replace(SETUP, loss_tile=256)
    assert buffers.loss_tile_bytes(SHAPE, tiled) == size(256, 1000) + size(256, 1000, dtype=FULL)
    assert buffers.loss_tile_bytes(replace(SHAPE, itemsize=4), tiled) == size(256, 1000, dtype=FULL)
    assert buffers.loss_gradient_bytes(SHAPE, tiled) == hidden + size(1000, 64, dtype=FULL)

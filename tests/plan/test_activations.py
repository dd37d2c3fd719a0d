"""Saved activations beside what autograd saves of transformers' own modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from longctx.plan import activations
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape

SHAPE = ModelShape(hidden=64, layers=2, heads=8, kv_heads=2, head_dim=16, inner=96, vocab=1000)
N = 32


def saved_bytes(module: torch.nn.Module, x: torch.Tensor) -> int:
    """Return the bytes per token that forward saves, without weights and ``x``; every storage once."""
    skipped = {p.untyped_storage().data_ptr() for p in (x, *module.parameters())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in skipped:
            found[storage.data_ptr()] = storage  # kept alive: no address is used twice
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = module(x)
    assert out.requires_grad
    return sum(storage.nbytes() for storage in found.values()) // N


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gated_mlp_and_a_norm_save_what_autograd_saves(dtype: torch.dtype) -> None:
    shape = replace(SHAPE, itemsize=dtype.itemsize)
    x = torch.randn(1, N, 64, dtype=dtype, requires_grad=True)
    config = LlamaConfig(hidden_size=64, intermediate_size=96)
    assert saved_bytes(LlamaMLP(config).to(dtype), x) == activations.mlp_intermediates(shape)
    norm = torch.nn.Sequential(LlamaRMSNorm(64), torch.nn.Linear(64, 64, bias=False)).to(dtype)
    own = shape.itemsize * 64 if dtype == torch.float32 else 0  # in fp32 the norm's input is the residual stream, ``x``
    assert saved_bytes(norm, x) == activations.norm_saved(shape, Setup(N)) - own


def test_each_policy_saves_less_than_the_one_before() -> None:
    b, hidden, q, kv, lse = 2, 64, 128, 32, 4 * 8
    attention = b * (3 * q + 2 * kv) + lse  # q, k, v, the output by head and by token
    saved = {
        policy: activations.layer_saved(SHAPE, Setup(N, recompute=policy, recompute_norms=True))
        for policy in ("none", "mlp", "layer_keep_attention", "layer")
    }
    assert saved["none"] == attention + b * 3 * hidden + b * 4 * 96  # norms: two inputs, one output
    assert saved["mlp"] == attention + b * 2 * hidden
    assert saved["layer_keep_attention"] == b * (hidden + q) + lse
    assert saved["layer"] == b * hidden


def test_offloaded_checkpoints_come_back_layer_by_layer() -> None:
    setup = Setup(N, recompute="layer_keep_attention", offload_checkpoints=True)
    whole = activations.checkpoint_saved(SHAPE, setup)
    assert activations.layer_saved(SHAPE, setup) == 0
    assert activations.checkpoint_fetched(SHAPE, setup) == whole
    assert activations.checkpoint_fetched(SHAPE, setup, attended=True) == 2 * whole
    assert activations.checkpoint_fetched(replace(SHAPE, layers=1), setup, attended=True) == whole
    assert activations.checkpoint_fetched(SHAPE, replace(setup, recompute_norms=True)) == whole - 2 * 64
    assert activations.checkpoint_fetched(SHAPE, replace(setup, offload_checkpoints=False)) == 0

"""The written-out backward of a gated MLP equals autograd's, and allocates at most four inner widths of a tile."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.zoo import tiny_config, tiny_model
from nn.inputs import check_bf16_gradients

from benchmarks.measure import peak_bytes
from longctx.models.activations import mlp as tiling
from longctx.nn.gated import Gated
from longctx.nn.tokenwise import tiled

from tolerances import tolerance

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


def make(
    width: int, inner: int, act: str = "silu", *, bias: bool = False, dtype: torch.dtype = torch.float64
) -> torch.nn.Module:
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = SimpleNamespace(hidden_size=width, intermediate_size=inner, hidden_act=act, mlp_bias=bias)
    return LlamaMLP(config).to(dtype)


def written_out(mlp: torch.nn.Module) -> Gated:
    found = tiling._gated(mlp)
    assert found is not None
    return found


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), width=st.integers(1, 6), inner=st.integers(1, 9),
    tile=st.integers(1, 40), act=st.sampled_from(ACTIVATIONS), bias=st.booleans(), seed=st.integers(0, 2**16),
    frozen=st.sampled_from(["", "x", "up_proj", "down_proj.weight", "all"]),
)  # fmt: skip
def test_equals_autograd(
    shape: list[int], width: int, inner: int, tile: int, act: str, bias: bool, seed: int, frozen: str
) -> None:
    torch.manual_seed(seed)
    mlp = make(width, inner, act, bias=bias)
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_(frozen != "all" and not (frozen and name.startswith(frozen)))
    x = torch.randn(*shape, width, dtype=torch.float64, requires_grad=frozen != "x")
    inputs = [t for t in (x, *mlp.parameters()) if t.requires_grad]
    truth, ours = mlp(x), tiled(mlp, x, list(mlp.parameters()), tile, gated=written_out(mlp))
    dout = torch.randn_like(truth)
    assert torch.equal(ours, tiled(mlp, x, list(mlp.parameters()), tile))
    wanted = torch.autograd.grad(truth, inputs, dout)
    for got, right in zip(torch.autograd.grad(ours, inputs, dout), wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=tolerance("fp64"), atol=tolerance("fp64"))


def test_bf16_weights_get_sums_in_fp32() -> None:
    check_bf16_gradients(
        lambda dtype: make(8, 16, dtype=dtype),
        lambda mlp, x: tiled(mlp, x, list(mlp.parameters()), 8, gated=written_out(mlp)),
    )


def test_a_tile_holds_four_inner_widths_beside_the_gradients() -> None:
    mlp, x = make(64, 256, dtype=torch.float32), torch.randn(1, 512, 64, requires_grad=True)
    dout, inner = torch.randn(1, 512, 64), 32 * 256 * 4
    kept = dout.nbytes + x.nbytes + sum(p.nbytes for p in mlp.parameters())  # the result and all gradients

    def both() -> None:
        out = tiled(mlp, x, list(mlp.parameters()), 32, gated=written_out(mlp))
        torch.autograd.grad(out, [x, *mlp.parameters()], dout)

    assert kept + 4 * inner <= peak_bytes(both) < kept + 5 * inner


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2"])
def test_gated_mlps_of_models_are_recognised(kind: str) -> None:
    for layer in tiny_model(tiny_config(kind), "longctx").model.layers:
        written_out(layer.mlp)


def test_modified_linears_fall_back_to_autograd() -> None:
    for change in ("hook", "forward", "adapter", "activation"):
        mlp = make(4, 6)
        if change == "hook":
            mlp.up_proj.register_forward_hook(lambda *_: None)
        elif change == "forward":
            mlp.up_proj.forward = torch.nn.functional.relu
        elif change == "adapter":
            mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
        else:
            mlp.act_fn = torch.nn.Tanh()
        assert tiling._gated(mlp) is None, change


def test_autocast_falls_back_to_autograd() -> None:
    mlp, x = make(4, 6, dtype=torch.float32), torch.randn(1, 20, 4, requires_grad=True)
    results = []
    for gated in (None, written_out(mlp)):
        with torch.autocast("cpu", torch.bfloat16):
            out = tiled(mlp, x, list(mlp.parameters()), 6, gated=gated)
        results.append(torch.autograd.grad(out.float().sum(), [x, *mlp.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

"""RMSNorms that keep only their input: the same bits forward, the same gradients, fewer bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.zoo import VOCABULARY, tiny_config, tiny_model
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import peak_bytes
from longctx.models.activations.norms import recompute_norms

from tolerances import tolerance

PER_MODEL = {"llama": 5, "mistral": 5, "qwen3": 9, "gemma2": 9, "gemma3": 13, "olmo2": 9, "gpt2": 0}


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    ids = torch.randint(0, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", PER_MODEL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_trains_as_it_did(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(tiny_config(kind), "longctx").to(dtype).train()
    loss, wanted = gradients(model)
    assert len(recompute_norms(model)) == PER_MODEL[kind]
    ours, got = gradients(model)
    assert torch.equal(ours, loss) and got.keys() == wanted.keys()
    limit = tolerance("model" if dtype == torch.float64 else "bf16 result")
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= limit * gradient.norm().clamp(min=1e-6), name


def norm_of(dtype: torch.dtype, width: int = 64) -> torch.nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(width).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradients_bits_are_the_norms_own(dtype: torch.dtype) -> None:
    norm, x = norm_of(dtype), torch.randn(2, 50, 64, dtype=dtype, requires_grad=True)
    dout = torch.randn_like(x)
    wanted = torch.autograd.grad(norm(x), [x, norm.weight], dout)
    recompute_norms(torch.nn.Sequential(norm))
    for got, right in zip(torch.autograd.grad(norm(x), [x, norm.weight], dout), wanted, strict=True):
        assert torch.equal(got, right)


def test_only_the_input_is_kept() -> None:
    norm, x = norm_of(torch.bfloat16), torch.randn(1, 4096, 64, dtype=torch.bfloat16, requires_grad=True)

    def kept() -> int:
        held: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            norm(x)
        return sum(t.nbytes for t in {t.data_ptr(): t for t in held}.values())

    before = kept()
    recompute_norms(torch.nn.Sequential(norm))
    assert kept() == x.nbytes and before >= 3 * x.nbytes
    assert peak_bytes(lambda: norm(x)) <= before + x.nbytes + 2 * 4 * x.numel()


def test_a_backward_holds_the_chain_of_one_tile() -> None:
    """All of it at once would be more than the norm itself holds, and raise a step's peak instead of lowering it."""
    norm, x = norm_of(torch.bfloat16, 256), torch.randn(1, 4096, 256, dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(norm(x), [x, norm.weight], dout)

    wanted, whole = step(), peak_bytes(step)
    recompute_norms(torch.nn.Sequential(norm))
    assert peak_bytes(step) < whole / 2
    dx, dweight = step()
    assert torch.equal(dx, wanted[0])
    assert (dweight - wanted[1]).norm() <= tolerance("bf16 result") * wanted[1].norm()


def test_under_a_checkpoint_too() -> None:
    norm, x = norm_of(torch.float32), torch.randn(1, 40, 64, requires_grad=True)
    layer = lambda x: (norm(x.sin()) * x).cos()  # noqa: E731
    wanted = torch.autograd.grad(layer(x).sum(), [x, norm.weight])
    recompute_norms(torch.nn.Sequential(norm))
    got = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), [x, norm.weight])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_without_gradients_nothing_changes() -> None:
    norm, x = norm_of(torch.float32), torch.randn(1, 40, 64)
    wanted = norm(x).detach()
    recompute_norms(torch.nn.Sequential(norm))
    with torch.no_grad():
        assert torch.equal(norm(x), wanted) and not norm(x).requires_grad

"""The kernels of bounded memory, interpreted, against torch's chunks in fp64: from state to state, every gradient.

What is not written is NaN (conftest.py), so a row or a chunk that no program covers shows.
"""

from __future__ import annotations

import pytest
import torch
from bounded import direct
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx import abc_attention, cosine_attention
from longctx.bounded.abc.control import window
from longctx.bounded.state import ABCState, CosineState
from longctx.errors import AttentionError

from tolerances import tolerance

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
Tensor = torch.Tensor


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, of the largest value of each tensor."""
    found = [
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1.0)).item() for a, b in zip(ours, theirs, strict=True)
    ]
    return max(found)


def cosine(
    leaves: list[Tensor], weight: Tensor, state_weight: Tensor, documents: Tensor | None, scale_on: str, backend: str
) -> list[Tensor]:
    """[out, state after, gradients of q, k, v, m and the state before]."""
    document = None if documents is None else documents[:, 0]
    state = CosineState(leaves[4], torch.full((leaves[0].shape[0],), 3), document)
    out, after = cosine_attention(
        *leaves[:4], scale_on=scale_on, document_ids=documents, state=state, return_state=True, backend=backend
    )
    loss = (out.to(weight.dtype) * weight).sum() + (after.memory * state_weight).sum()
    return [out.detach(), after.memory.detach(), *torch.autograd.grad(loss, leaves)]


@settings(max_examples=10)
@given(
    st.integers(1, 40),
    st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    st.sampled_from([(5, 3), (16, 20), (20, 16)]),
    st.sampled_from(["value", "query"]),
    st.booleans(),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 2**16),
)
def test_cosine(
    length: int, heads: tuple[int, int], widths: tuple[int, int], scale_on: str, packed: bool, dtype: str, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    (h, kv), (d_k, d_v) = heads, widths
    shapes = (h, length, d_k), (kv, length, d_k), (kv, length, d_v)
    inputs = [normal(g, 1, *shape).to(DTYPES[dtype]) for shape in shapes]
    inputs += [normal(g, kv if scale_on == "value" else h), normal(g, 1, kv, d_k, d_v)]
    weights = normal(g, 1, h, length, d_v), normal(g, 1, kv, d_k, d_v)
    documents = direct.random_documents(1, length, g) if packed else None
    ours = cosine([x.requires_grad_() for x in inputs], *weights, documents, scale_on, "triton")
    doubled = [x.detach().double().requires_grad_() for x in inputs]
    theirs = cosine(doubled, *(x.double() for x in weights), documents, scale_on, "chunked")
    assert ours[0].dtype == DTYPES[dtype] and ours[1].dtype == torch.float32
    assert worst(ours, theirs) <= tolerance(dtype)


def test_padding_changes_nothing_whatever_it_holds() -> None:
    g = torch.Generator().manual_seed(0)
    plain = [normal(g, 1, 1, 18, 8) for _ in range(3)] + [normal(g, 1)]
    weight = normal(g, 1, 1, 18, 8)
    filled = [torch.full((1, 1, 30, 8), torch.nan) for _ in range(3)]
    for wide, x in zip(filled, plain, strict=False):
        wide[:, :, 5:23] = x
    results = []
    for inputs, documents, here in (
        ([*filled, plain[3]], direct.packed([[(-1, 5), (2, 18), (-1, 7)]]), slice(5, 23)),
        (plain, None, slice(None)),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = cosine_attention(*leaves, document_ids=documents, backend="triton")
        grads = torch.autograd.grad((out[:, :, here] * weight).sum(), leaves)
        assert all(x.isfinite().all() for x in (out, *grads))
        results.append([out[:, :, here].detach(), *(x[:, :, here] for x in grads[:3]), grads[3]])
    assert worst(results[0], [x.double() for x in results[1]]) <= tolerance("fp32")


def test_states_beyond_the_range_of_fp16() -> None:
    """Sums over a sequence, and of gradients, pass 65504; what is read of them need not."""
    g = torch.Generator().manual_seed(1)
    q, k, v = torch.ones(1, 1, 20, 16), normal(g, 1, 1, 20, 16), 1e-3 * normal(g, 1, 1, 20, 2)
    memory = torch.tensor([1e5, -1e5]).repeat(8)[None, None, :, None].repeat(1, 1, 1, 2)  # to such queries it is 0
    results = []
    for backend, dtype in (("triton", torch.float16), ("chunked", torch.float64)):
        leaves = [x.half().to(dtype).requires_grad_() for x in (q, k, v)]
        wide = torch.promote_types(dtype, torch.float32)
        state = CosineState(memory.to(wide), torch.tensor([7]))
        out, after = cosine_attention(
            *leaves, torch.zeros(1, dtype=wide), state=state, return_state=True, backend=backend
        )
        (dk,) = torch.autograd.grad((after.memory * torch.tensor([1e5, -2e5], dtype=wide)).sum(), leaves[1])
        results.append([out.detach(), after.memory.detach(), dk])
    assert worst(*results) <= tolerance("fp16")


def abc(leaves: list[Tensor], weights: list[Tensor], documents: Tensor | None, backend: str) -> list[Tensor]:
    """[out, state after, gradients of q, k, v, the logits and the state before]."""
    q, k, v, s, mass, keys, values = leaves
    state = ABCState(mass, keys, values, None if documents is None else documents[:, 0])
    out, after = abc_attention(q, k, v, s, document_ids=documents, state=state, return_state=True, backend=backend)
    found = [out, after.log_mass, after.keys, after.values]
    found[1] = found[1].masked_fill(found[1] == -torch.inf, 0.0)
    loss = sum((x.to(w.dtype) * w).sum() for x, w in zip(found, weights, strict=True))
    return [*(x.detach() for x in found), *torch.autograd.grad(loss, leaves)]


@settings(max_examples=4)
@given(
    st.integers(1, 18),
    st.sampled_from([(1, 1), (2, 1)]),
    st.sampled_from([(5, 3, 4), (8, 16, 3), (3, 5, 17)]),
    st.booleans(),
    st.sampled_from(["fp32", "fp32", "fp16"]),
    st.sampled_from([1.0, 25.0]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_abc(
    length: int, heads: tuple[int, int], widths: tuple[int, int, int], packed: bool, dtype: str, growth: float,
    empty: bool, seed: int,
) -> None:  # fmt: skip
    """Also logits that gain more than exp(60) within a chunk, and slots that are never written."""
    g = torch.Generator().manual_seed(seed)
    (h, kv), (d_k, d_v, slots) = heads, widths
    shapes = (h, length, d_k), (kv, length, d_k), (kv, length, d_v), (kv, length, slots)
    inputs = [normal(g, 1, *shape).to(DTYPES[dtype]) for shape in shapes]
    inputs[3] = inputs[3] * growth
    state_shapes = (1, kv, slots), (1, kv, slots, d_k), (1, kv, slots, d_v)
    inputs += [normal(g, *shape) for shape in state_shapes]
    if empty:
        inputs[3][..., 0] = -torch.inf
        inputs[4].fill_(-torch.inf)
        inputs[5].zero_()
        inputs[6].zero_()
    weights = [normal(g, *shape) for shape in ((1, h, length, d_v), *state_shapes)]
    documents = direct.random_documents(1, length, g) if packed else None
    ours = abc([x.requires_grad_() for x in inputs], weights, documents, "triton")
    doubled = [x.detach().double().requires_grad_() for x in inputs]
    theirs = abc(doubled, [x.double() for x in weights], documents, "chunked")
    assert ours[0].dtype == DTYPES[dtype] and ours[1].dtype == torch.float32
    assert worst(ours, theirs) <= tolerance(dtype)


def test_what_there_is_no_kernel_for_is_named() -> None:
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(AttentionError, match="without causal"):
        cosine_attention(x, x, x, torch.zeros(1), causal=False, backend="triton")
    with pytest.raises(AttentionError, match="float64"):
        cosine_attention(x.double(), x.double(), x.double(), torch.zeros(1), backend="triton")
    with pytest.raises(AttentionError, match="bfloat16"):
        cosine_attention(x.bfloat16(), x.bfloat16(), x.bfloat16(), torch.zeros(1), backend="triton")
    for message, control, options in (
        ("without causal", x, {"causal": False}),
        ("'running'", x, {"normalizer": "running"}),
        ("not a pair", (x, x), {}),
        ("not 129", x.repeat(1, 1, 1, 17)[..., :129], {}),
        ("queue", window(2), {}),
    ):
        with pytest.raises(AttentionError, match=message):
            abc_attention(x, x, x, control, backend="triton", **options)

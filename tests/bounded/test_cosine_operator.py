"""Cottention on one device equals its quadratic definition, forward and in every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounded import direct
from bounded.inputs import of_cosine
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.bounded import walk
from longctx.bounded.cosine.operator import cosine_attention
from longctx.errors import AttentionError

from tolerances import tolerance

EXACT = tolerance("fp64")


@settings(max_examples=25)
@given(
    st.integers(1, 70),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.sampled_from([1, 3, 16, 64]),
    st.sampled_from(["value", "query"]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_quadratic_is_chunked(
    length: int, heads: tuple[int, int], chunk: int, scale_on: str, docs: bool, seed: int
) -> None:
    leaves, weight, g = of_cosine(heads=heads[0], groups=heads[1], length=length, seed=seed)
    documents = direct.random_documents(2, length, g) if docs else None
    expected = direct.cosine(*leaves, direct.visible(length, documents), scale_on)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "CHUNK", chunk)
        patch.setattr(walk, "BLOCK_ROWS", 256)
        ours = cosine_attention(*leaves, scale_on=scale_on, document_ids=documents)
        direct.check(ours, expected, weight, leaves)


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(1, 30), st.sampled_from([(2, 9), (9, 2)]), st.booleans(), st.integers(0, 2**16))
def test_over_all_tokens(queries: int, keys: int, widths: tuple[int, int], docs: bool, seed: int) -> None:
    """Bidirectional and cross, by whichever product is cheaper, packed or not."""
    leaves, _, g = of_cosine(length=keys, width=widths[0], out=widths[1], seed=seed)
    documents = direct.random_documents(2, keys, g) if docs else None
    queries = keys if docs else queries
    leaves[0] = torch.randn(2, 4, queries, widths[0], generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(2, 4, queries, widths[1], generator=g, dtype=torch.float64)
    seen = direct.visible(keys, documents, causal=False)[:, :1].expand(-1, queries, -1)
    if docs:
        seen = direct.visible(keys, documents, causal=False)
    expected = direct.cosine(*leaves, seen, "query")
    ours = cosine_attention(*leaves, causal=False, document_ids=documents)
    direct.check(ours, expected, weight, leaves)


def test_lengths_of_rows_do_not_matter() -> None:
    """N(q) and N(k) have no scale; rotations of both change nothing."""
    (q, k, v, m), _, g = of_cosine(width=4)
    out = cosine_attention(q, k, v, m)
    assert direct.differences([cosine_attention(3 * q, k / 7, v, m)], [out])[0] <= EXACT
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))
    assert direct.differences([cosine_attention(q @ turn, k @ turn, v, m)], [out])[0] <= EXACT


def test_zero_rows_stay_zero() -> None:
    (q, k, v, m), weight, _ = of_cosine()
    q, k = (x.detach().clone() for x in (q, k))
    q[:, :, 5] = k[:, :, 9] = 0.0
    leaves = [x.requires_grad_() for x in (q, k, v, m)]
    out = cosine_attention(*leaves)
    assert not out[:, :, 5].any()
    assert all(x.isfinite().all() for x in direct.gradients(out, weight, leaves))


def test_one_exponent_per_key_head_keeps_one_state_per_key_head() -> None:
    (q, k, v, m), _, _ = of_cosine()
    shared = cosine_attention(q, k, v, m[:2], return_state=True)
    same = cosine_attention(q, k, v, m[:2].repeat_interleave(2), return_state=True)
    assert shared[1].memory.shape[1] == 2 and same[1].memory.shape[1] == 4
    assert direct.differences([shared[0]], [same[0]])[0] <= EXACT


def refuse(message: str, **changes: Any) -> None:
    (q, k, v, m), _, _ = of_cosine()
    arguments = {"q": q, "k": k, "v": v, "m": m} | changes
    with pytest.raises(AttentionError, match=message):
        cosine_attention(*[arguments.pop(name) for name in ("q", "k", "v", "m")], **arguments)


def test_what_does_not_fit_is_refused() -> None:
    refuse("backend='triton'", backend="triton")
    refuse("scale_on='key'", scale_on="key")
    refuse("or per key head", m=torch.zeros(3))
    refuse("per query head", m=torch.zeros(2), scale_on="query")
    refuse("one key per query", q=torch.zeros(2, 4, 5, 5, dtype=torch.float64))
    refuse("length=40", length=40)

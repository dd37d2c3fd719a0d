"""Cottention on one device: quadratic = token by token = chunked, forward and every gradient, at any split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounded import direct
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.bounded import walk
from longctx.bounded.cosine.operator import cosine_attention
from longctx.errors import AttentionError
from longctx.kernels.cosine import reference

from tolerances import tolerance

EXACT = tolerance("fp64")


def make(
    batch: int = 2, heads: int = 4, groups: int = 2, length: int = 37, width: int = 5, out: int = 3, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Generator]:
    """([q, k, v, m], a weight for the output, a generator)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    leaves = [
        normal(batch, heads, length, width), normal(batch, groups, length, width),
        normal(batch, groups, length, out), normal(heads),
    ]  # fmt: skip
    return [x.requires_grad_() for x in leaves], normal(batch, heads, length, out), g


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
    leaves, weight, g = make(2, *heads, length, seed=seed)
    documents = direct.random_documents(2, length, g) if docs else None
    expected = direct.cosine(*leaves, direct.visible(length, documents), scale_on)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "CHUNK", chunk)
        patch.setattr(walk, "BLOCK_ROWS", 256)
        ours = cosine_attention(*leaves, scale_on=scale_on, document_ids=documents)
        found = [ours, *direct.gradients(ours, weight, leaves)]
    assert max(direct.differences(found, [expected, *direct.gradients(expected, weight, leaves)])) <= EXACT


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(1, 30), st.sampled_from([(2, 9), (9, 2)]), st.booleans(), st.integers(0, 2**16))
def test_over_all_tokens(queries: int, keys: int, widths: tuple[int, int], docs: bool, seed: int) -> None:
    """Bidirectional and cross, by whichever product is cheaper, packed or not."""
    leaves, _, g = make(length=keys, width=widths[0], out=widths[1], seed=seed)
    documents = direct.random_documents(2, keys, g) if docs else None
    queries = keys if docs else queries
    leaves[0] = torch.randn(2, 4, queries, widths[0], generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(2, 4, queries, widths[1], generator=g, dtype=torch.float64)
    seen = direct.visible(keys, documents, causal=False)[:, :1].expand(-1, queries, -1)
    if docs:
        seen = direct.visible(keys, documents, causal=False)
    expected = direct.cosine(*leaves, seen, "query")
    ours = cosine_attention(*leaves, causal=False, document_ids=documents)
    found = [ours, *direct.gradients(ours, weight, leaves)]
    assert max(direct.differences(found, [expected, *direct.gradients(expected, weight, leaves)])) <= EXACT


def test_both_orders_of_the_product_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from longctx.bounded.cosine import forms as cosine_forms

    leaves, weight, _ = make()
    answers = []
    for pairs in (False, True):
        monkeypatch.setattr(cosine_forms, "_pairs_are_cheaper", lambda *_, pairs=pairs: pairs)
        out = cosine_attention(*leaves, causal=False)
        answers.append([out, *direct.gradients(out, weight, leaves)])
    assert max(direct.differences(*answers)) <= EXACT


@pytest.mark.parametrize("scale_on", ["value", "query"])
@pytest.mark.parametrize("docs", [False, True])
def test_states_and_their_gradients(scale_on: str, docs: bool) -> None:
    """Token by token = chunked, from a state to a state."""
    leaves, weight, g = make(groups=4)
    documents = (
        direct.packed([[(-1, 3), (4, 17), (5, 10), (-1, 7)], [(2, 1), (3, 8), (-1, 3), (7, 25)]]) if docs else None
    )
    document = torch.tensor([4, 1]) if docs else None
    memory = torch.randn(2, 4, 5, 3, generator=g, dtype=torch.float64).requires_grad_()
    count = torch.tensor([3, 5])
    out, after, counted, last = reference.recurrent(*leaves, memory, count, documents, document, scale_on=scale_on)
    from longctx.bounded.state import CosineState

    ours, state = cosine_attention(
        *leaves, scale_on=scale_on, document_ids=documents, state=CosineState(memory, count, document),
        return_state=True,
    )  # fmt: skip
    assert state.count.equal(counted) and (last is None or state.document.equal(last))
    more = torch.randn(after.shape, generator=g, dtype=torch.float64)
    inputs = [*leaves, memory]
    both = [
        [o, s, *torch.autograd.grad((o * weight).sum() + (s * more).sum(), inputs)]
        for o, s in ((ours, state.memory), (out, after))
    ]
    assert max(direct.differences(*both)) <= EXACT


@pytest.mark.parametrize("cuts", [[1] * 37, [5, 1, 20, 11], [36, 1]])
@pytest.mark.parametrize("scale_on", ["value", "query"])
def test_any_split_with_the_state_carried(cuts: list[int], scale_on: str) -> None:
    leaves, weight, _ = make()
    q, k, v, m = leaves
    expected = cosine_attention(*leaves, scale_on=scale_on)
    state, outs, start = None, [], 0
    sizes = set()
    for cut in cuts:
        part = slice(start, start + cut)
        out, state = cosine_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], m, scale_on=scale_on, state=state, return_state=True
        )
        outs.append(out)
        sizes.add(state.nbytes)
        start += cut
    ours = torch.cat(outs, 2)
    found = [ours, *direct.gradients(ours, weight, leaves)]
    assert max(direct.differences(found, [expected, *direct.gradients(expected, weight, leaves)])) <= EXACT
    assert len(sizes) == 1 and int(state.count[0]) == 37


def test_lengths_of_rows_do_not_matter() -> None:
    """N(q) and N(k) have no scale; rotations of both change nothing."""
    (q, k, v, m), _, g = make(width=4)
    out = cosine_attention(q, k, v, m)
    assert direct.differences([cosine_attention(3 * q, k / 7, v, m)], [out])[0] <= EXACT
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))
    assert direct.differences([cosine_attention(q @ turn, k @ turn, v, m)], [out])[0] <= EXACT


def test_zero_rows_stay_zero() -> None:
    (q, k, v, m), weight, _ = make()
    q, k = (x.detach().clone() for x in (q, k))
    q[:, :, 5] = k[:, :, 9] = 0.0
    leaves = [x.requires_grad_() for x in (q, k, v, m)]
    out = cosine_attention(*leaves)
    assert not out[:, :, 5].any()
    assert all(x.isfinite().all() for x in direct.gradients(out, weight, leaves))


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing_whatever_it_holds(causal: bool) -> None:
    leaves, weight, _ = make()
    plain = cosine_attention(*leaves, causal=causal)
    wide = [
        torch.cat([torch.full_like(x[:, :, :4], torch.nan), x, torch.full_like(x[:, :, :6], torch.nan)], 2).detach()
        for x in leaves[:3]
    ]
    wide = [*(x.requires_grad_() for x in wide), leaves[3]]
    padded = cosine_attention(*wide, causal=causal, document_ids=direct.packed([[(-1, 4), (3, 37), (-1, 6)]] * 2))
    assert not padded[:, :, :4].any() and not padded[:, :, 41:].any()
    grads = torch.autograd.grad((padded[:, :, 4:41] * weight).sum(), wide)
    assert all(x.isfinite().all() for x in grads)
    found = [padded[:, :, 4:41], *(x[:, :, 4:41] for x in grads[:3]), grads[3]]
    assert max(direct.differences(found, [plain, *direct.gradients(plain, weight, leaves)])) <= EXACT


def test_an_exponent_a_key_head_keeps_one_memory_a_key_head() -> None:
    (q, k, v, m), _, _ = make()
    shared = cosine_attention(q, k, v, m[:2], return_state=True)
    same = cosine_attention(q, k, v, m[:2].repeat_interleave(2), return_state=True)
    assert shared[1].memory.shape[1] == 2 and same[1].memory.shape[1] == 4
    assert direct.differences([shared[0]], [same[0]])[0] <= EXACT


def refuse(message: str, **changes: Any) -> None:
    (q, k, v, m), _, _ = make()
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

"""ABC on one device equals its definition, forward and in every gradient, with chunks of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounded import direct
from bounded.inputs import of_abc
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.bounded import walk
from longctx.bounded.abc import control
from longctx.bounded.abc.operator import abc_attention
from longctx.bounded.state import ABCState
from longctx.errors import AttentionError

from tolerances import tolerance

EXACT = tolerance("fp64")
SCALE = 0.7


@settings(max_examples=25)
@given(
    st.integers(1, 70),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    st.integers(1, 5),
    st.sampled_from([1, 3, 16, 64]),
    st.sampled_from(["prefix", "running"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_direct_is_chunked(
    length: int, heads: tuple[int, int], slots: int, chunk: int, normalizer: str, pair: bool, docs: bool, seed: int
) -> None:
    leaves, weight, g = of_abc(slots, heads=heads[0], groups=heads[1], length=length, seed=seed)
    q, k, v, key, value = leaves
    documents = direct.random_documents(2, length, g) if docs else None
    seen = direct.visible(length, documents)
    expected = direct.abc(q, k, v, key, value if pair else key, seen, normalizer, SCALE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "CHUNK", chunk)
        patch.setattr(walk, "BLOCK_ROWS", 256)
        ours = abc_attention(
            q, k, v, (key, value) if pair else key, normalizer=normalizer, scale=SCALE, document_ids=documents
        )
        direct.check(ours, expected, weight, leaves)


def test_state_can_be_reordered_and_saved(tmp_path: Any) -> None:
    (q, k, v, s, _), _, _ = of_abc()
    first = slice(0, 20)
    _, state = abc_attention(q[:, :, first], k[:, :, first], v[:, :, first], s[:, :, first], return_state=True)
    torch.save(vars(state.detach()), tmp_path / "state.pt")
    state = ABCState(**torch.load(tmp_path / "state.pt", weights_only=True)).select(torch.tensor([1, 1, 0]))
    rest = slice(20, 37)
    order = torch.tensor([1, 1, 0])
    q2, k2, v2, s2 = (x[order][:, :, rest] for x in (q, k, v, s))
    ours = abc_attention(q2, k2, v2, s2, state=state)
    assert direct.differences([ours], [abc_attention(q, k, v, s)[order][:, :, rest]])[0] <= EXACT


def test_identities() -> None:
    """First output = first value; one slot ignores queries; constant control = mean so far; prefix = a gated state."""
    (q, k, v, s, _), _, _ = of_abc(heads=2)
    out = abc_attention(q, k, v, s)
    assert direct.differences([out[:, :, 0]], [v[:, :, 0]])[0] <= EXACT
    one = s[..., :1]
    assert direct.differences([abc_attention(q, k, v, one)], [abc_attention(q * 7, k, v, one)])[0] <= EXACT
    flat = abc_attention(q, k, v, torch.zeros_like(s))
    mean = v.cumsum(2) / torch.arange(1, 38, dtype=torch.float64)[:, None]
    assert direct.differences([flat], [mean])[0] <= EXACT
    mass = torch.logcumsumexp(s, 2)
    before = torch.cat([torch.full_like(mass[:, :, :1], -torch.inf), mass[:, :, :-1]], 2)
    keys = values = torch.zeros(())
    gated = []
    for t in range(37):
        keep, add = (before - mass)[:, :, t, :, None].exp(), (s - mass)[:, :, t, :, None].exp()
        keys = keep * keys + (1 - keep) * k[:, :, t, None]
        values = keep * values + add * v[:, :, t, None]
        p = (q[:, :, t, None] @ keys.transpose(-1, -2) / 5**0.5).softmax(-1)
        gated.append((p @ values)[:, :, 0])
    assert direct.differences([out], [torch.stack(gated, 2)])[0] <= EXACT


def test_invariances() -> None:
    """Slots have no order; a constant added to a slot's logits changes nothing; keys' rotation stays relative."""
    (q, k, v, s, _), _, _ = of_abc()
    out = abc_attention(q, k, v, s)
    assert direct.differences([abc_attention(q, k, v, s[..., [2, 0, 3, 1]])], [out])[0] <= EXACT
    shifted = abc_attention(q, k, v, s + torch.tensor([3.0, -200.0, 0.1, 40.0], dtype=torch.float64))
    assert direct.differences([shifted], [out])[0] <= EXACT


def test_identity_control_is_softmax_attention() -> None:
    (q, k, v, _, _), weight, _ = of_abc(heads=2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    ours = abc_attention(q, k, v, control.identity())
    direct.check(ours, expected, weight, [q, k, v])


@settings(max_examples=10)
@given(st.integers(1, 20), st.integers(1, 30), st.booleans(), st.integers(0, 2**16))
def test_over_all_tokens(queries: int, keys: int, pair: bool, seed: int) -> None:
    """Bidirectional and cross attention: every slot is attention by a learned query, then a softmax over slots."""
    (_, k, v, key, value), _, g = of_abc(length=keys, seed=seed)
    q = torch.randn(2, 4, queries, 5, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(2, 4, queries, 3, generator=g, dtype=torch.float64)
    leaves = [q, k, v, key, value]
    slots_k = key.softmax(2).transpose(-1, -2) @ k
    slots_v = (value if pair else key).softmax(2).transpose(-1, -2) @ v
    slots_k, slots_v = (x.repeat_interleave(2, 1) for x in (slots_k, slots_v))
    expected = (SCALE * q @ slots_k.transpose(-1, -2)).softmax(-1) @ slots_v
    ours = abc_attention(q, k, v, (key, value) if pair else key, causal=False, normalizer="global", scale=SCALE)
    direct.check(ours, expected, weight, leaves)


def test_packed_documents_without_causal_are_documents_alone() -> None:
    (q, k, v, s, _), _, _ = of_abc()
    ids = direct.packed([[(-1, 3), (4, 17), (5, 10), (-1, 7)], [(2, 30), (3, 7)]])
    ours = abc_attention(q, k, v, s, causal=False, document_ids=ids)
    for row, here in ((0, slice(3, 20)), (0, slice(20, 30)), (1, slice(0, 30)), (1, slice(30, 37))):
        alone = abc_attention(*(x[row : row + 1, :, here] for x in (q, k, v, s)), causal=False)
        assert direct.differences([ours[row : row + 1, :, here]], [alone])[0] <= EXACT


def test_nothing_is_written() -> None:
    """Logits of -inf everywhere: zero, no gradient, no NaN."""
    (q, k, v, s, _), weight, _ = of_abc()
    s = torch.full_like(s, -torch.inf).requires_grad_()
    out = abc_attention(q, k, v, s)
    assert not out.any() and not any(x.any() for x in torch.autograd.grad(out, [q, k, v, s], weight))


def refuse(message: str, **changes: Any) -> None:
    (q, k, v, s, _), _, _ = of_abc()
    arguments = {"q": q, "k": k, "v": v, "control": s} | changes
    with pytest.raises(AttentionError, match=message):
        abc_attention(*[arguments.pop(name) for name in ("q", "k", "v", "control")], **arguments)


def test_what_does_not_fit_is_refused() -> None:
    refuse("layout|backend", backend="triton")
    refuse("normalizer='mean'", normalizer="mean")
    refuse("e\\^s has no bound", normalizer="sum")
    refuse("needs causal=False", normalizer="global")
    refuse("needs causal=True", normalizer="running", causal=False)
    refuse("one per token and slot", control=torch.zeros(2, 2, 36, 4))
    refuse("length=40", length=40)
    refuse("expected ABCState", state=object.__new__(control.Random))
    refuse("need causal=True", control=control.window(4), causal=False)
    refuse("are summed", control=control.linformer(torch.zeros(1, 4, 64)), normalizer="running")
    refuse("has 9 positions", control=control.linformer(torch.zeros(1, 4, 9)))
    refuse("has 9 positions", control=control.identity(9))
    refuse("one key per query", q=torch.zeros(2, 4, 5, 5, dtype=torch.float64))
    (q, k, v, s, _), _, _ = of_abc()
    _, state = abc_attention(q, k, v, s, return_state=True)
    refuse("from the first call on", state=state, document_ids=torch.zeros(2, 37, dtype=torch.int64))

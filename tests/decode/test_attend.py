"""Attention of new tokens to cached keys in torch, against one softmax per query in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode.test_el import assert_equal, case
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.decode.attend import _terms, decode_attention, flat, fold, on_kernels, unfold
from longctx.decode.logits import Logits
from longctx.decode.position import Alibi
from longctx.errors import AttentionError

F64 = torch.float64
OPTIONS = ("softcap", "sink", "alibi", "mask", "bias", "lengths")


@settings(max_examples=20)
@given(
    beams=st.integers(1, 3), groups=st.sampled_from([1, 2]), tokens=st.integers(1, 3), keys=st.integers(3, 9),
    names=st.sets(st.sampled_from(OPTIONS)), shared=st.booleans(), causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_one_softmax_per_query(
    beams: int, groups: int, tokens: int, keys: int, names: set[str], shared: bool, causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(2 * beams, 4, tokens, 5, dtype=F64), torch.randn(2, groups, keys, 5, dtype=F64)
    v = None if shared else torch.randn(2, groups, keys, 3, dtype=F64)
    made: dict[str, Any] = {
        "softcap": 1.5, "sink": torch.randn(4, dtype=F64), "alibi": torch.rand(4, dtype=F64),
        "mask": torch.rand(2 * beams, 1, tokens, keys) < 0.6, "bias": torch.randn(4, 1, keys, dtype=F64),
        "lengths": torch.tensor([0, keys - 1]),
    }  # fmt: skip
    o = {name: made[name] for name in names}
    if "bias" in o:  # a floating mask
        o["mask"] = o.pop("bias")
    out, lse = decode_attention(q, k, v, value_width=3 if shared else None, causal=causal, **o)
    values, position = k[..., :3] if v is None else v, torch.arange(keys)
    for row, head, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        b, g, i = row // beams, head // (4 // groups), keys - tokens + t
        s = k[b, g] @ q[row, head, t] / 5**0.5
        s = 1.5 * torch.tanh(s / 1.5) if "softcap" in o else s
        s = s - o["alibi"][head] * (i - position).abs() if "alibi" in o else s
        mask = o["mask"].expand(2 * beams, 4, tokens, keys)[row, head, t] if "mask" in o else torch.zeros(keys)
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
        s = s.masked_fill(position >= o["lengths"][b], -torch.inf) if "lengths" in o else s
        s = s.masked_fill(position > i, -torch.inf) if causal else s
        p = torch.softmax(torch.cat((s, o["sink"][head][None])) if "sink" in o else s, 0).nan_to_num(0.0)[:keys]
        assert_equal(out[row, head, t], p @ values[b, g])
        whole = torch.cat((s, o["sink"][head][None])) if "sink" in o else s
        assert_equal(lse[row, head, t], torch.logsumexp(whole, 0))


def test_rows_of_the_same_keys_are_adjacent() -> None:
    """Rows of the kernels are (beams, heads of a group, tokens), and unfold is the inverse of flat."""
    x = torch.arange(6 * 4 * 2 * 3).view(6, 4, 2, 3)  # 2 rows x 3 beams, 4 heads in 2 groups, 2 tokens
    folded = fold(x, 2, 2)
    assert folded.shape == (2, 2, 3, 2, 2, 3) and folded.data_ptr() == x.data_ptr()
    assert torch.equal(folded[1, 0, 2, 1], x[5, 1]) and torch.equal(flat(x, 2, 2)[1, 0, 11], x[5, 1, 1])
    assert torch.equal(unfold(flat(x, 2, 2), 6, 4, 2), x)


def test_alibi_needs_no_tensor_of_pairs() -> None:
    """EL passes ALiBi's slopes to the kernel, and a bias tensor for other functions of positions or other positions."""
    slopes = torch.tensor([0.1, 0.2])
    positions = torch.tensor([6])
    made = [
        _terms(Logits(1, 2, positions, bias=bias), 1, 7, 1, 6)
        for bias in (Alibi(slopes), lambda i, j: Alibi(slopes)(i, j))
    ]
    assert made[0].bias is None and torch.equal(made[0].slopes, slopes[None])
    assert made[1].slopes is None and made[1].bias.shape == (1, 1, 1, 2, 1, 7)
    moved = _terms(Logits(1, 2, positions, bias=Alibi(slopes), causal=True, key_positions=torch.arange(7)), 1, 7, 1, 3)
    assert moved.slopes is None and torch.equal(moved.bias, made[1].bias)
    assert not moved.causal and moved.mask.all()


def test_auto_is_torch_on_a_cpu() -> None:
    x = torch.randn(1, 1, 1, 16)
    assert not on_kernels("auto", x, x) and not on_kernels("torch", x, x) and on_kernels("triton", x, x)
    with pytest.raises(AttentionError, match="no dropout"):
        on_kernels("triton", x, x, unsupported="its decode kernels have no dropout")


def test_what_it_cannot_do_is_named() -> None:
    q, k = torch.randn(2, 2, 1, 16), torch.randn(1, 1, 8, 16)
    with pytest.raises(AttentionError, match="no gradient"):
        decode_attention(q.clone().requires_grad_(), k, backend="triton")
    with torch.no_grad():
        decode_attention(q.clone().requires_grad_(), k, backend="triton")
    assert decode_attention(q.clone().requires_grad_(), k)[0].requires_grad
    with pytest.raises(AttentionError, match="float64"):
        decode_attention(q.double(), k.double(), backend="triton")
    with pytest.raises(AttentionError, match="bfloat16"):
        decode_attention(q.bfloat16(), k.bfloat16(), backend="triton")
    with pytest.raises(AttentionError, match="use one of 'auto'"):
        decode_attention(q, k, backend="cuda")
    with pytest.raises(AttentionError, match="dropout"):
        case(keys=5, dropout_p=0.5, dropout_seed=torch.arange(2)).el(backend="triton")
    for message, wrong in (
        ("expected q", {"q": q[..., :8]}),
        ("must divide", {"q": q[:1].expand(3, -1, -1, -1), "k": k.expand(2, -1, -1, -1)}),
        ("beside k", {"v": k[:, :, :4]}),
        ("omit one", {"v": k, "value_width": 4}),
        ("columns of k", {"value_width": 17}),
        ("one dtype", {"k": k.half()}),
    ):
        with pytest.raises(AttentionError, match=message):
            decode_attention(**({"q": q, "k": k} | wrong))

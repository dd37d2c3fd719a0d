"""EL-attention against the attention it replaces: keys and values computed in full, dense softmax, fp64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.decode.el import el_attention, expanded_attention, fold_values
from longctx.decode.norm import Norm, key_scales
from longctx.decode.position import Alibi, RelativeBias
from longctx.errors import AttentionError
from longctx.kernels.flash.dropout import kept

from tolerances import tolerance

F64 = torch.float64


@dataclasses.dataclass
class Case:
    """One attention layer, its inputs, and the options of the call."""

    x: torch.Tensor
    hidden: torch.Tensor
    weights: dict[str, torch.Tensor]
    heads: int
    options: dict[str, Any]

    def el(self, **changes: Any) -> torch.Tensor:
        w = self.weights | {name: changes.pop(name) for name in list(changes) if name in self.weights}
        return el_attention(self.x, self.hidden, heads=self.heads, **w, **(self.options | changes))

    def dense(self) -> torch.Tensor:
        """Compute the attention as models do."""
        w, o, heads = self.weights, self.options, self.heads
        beams = self.x.shape[0] // self.hidden.shape[0]
        hidden = self.hidden.repeat_interleave(beams, 0)
        linear = torch.nn.functional.linear
        q = linear(self.x, w["w_q"], w["b_q"]).unflatten(-1, (heads, -1))
        groups = w["w_k"].shape[0] // q.shape[-1]
        k = linear(hidden, w["w_k"], w["b_k"]).unflatten(-1, (groups, -1))
        v = linear(hidden, w["w_v"], w["b_v"]).unflatten(-1, (groups, -1))
        q = o["q_norm"](q) if o.get("q_norm") else q
        k = o["k_norm"](k) if o.get("k_norm") else k
        k, v = (x.repeat_interleave(heads // groups, 2) for x in (k, v))
        logits = torch.einsum("bthd,bshd->bhts", q, k) * (o.get("scale") or q.shape[-1] ** -0.5)
        if o.get("softcap"):
            logits = torch.tanh(logits / o["softcap"]) * o["softcap"]
        tokens, keys = logits.shape[-2:]
        queries = torch.arange(tokens) + keys - tokens
        if o.get("bias"):
            logits = logits + o["bias"](queries, torch.arange(keys))
        if o.get("mask") is not None:
            logits = logits.masked_fill(~o["mask"], -torch.inf)
        if o.get("causal"):
            logits = logits.masked_fill(torch.arange(keys) > queries[:, None], -torch.inf)
        if o.get("sink") is not None:
            logits = torch.cat((o["sink"][None, :, None, None].expand(*logits.shape[:3], 1), logits), -1)
        p = torch.softmax(logits, -1).nan_to_num(0.0)[..., -keys:]
        if o.get("dropout_p"):
            p = p * kept(o["dropout_seed"], heads, queries, torch.arange(keys), o["dropout_p"]) / (1 - o["dropout_p"])
        out = torch.einsum("bhts,bshd->bthd", p, v).flatten(2)
        return linear(out, w["w_o"], w["b_o"])


def case(
    *, seed: int = 0, batch: int = 2, beams: int = 1, tokens: int = 3, keys: int = 11, heads: int = 4, groups: int = 4,
    dim: int = 4, value_dim: int = 4, width: int = 12, **options: Any,
) -> Case:  # fmt: skip
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=F64)

    weights = {
        "w_q": normal(heads * dim, width), "w_k": normal(groups * dim, width), "w_v": normal(groups * value_dim, width),
        "w_o": normal(width, heads * value_dim), "b_q": normal(heads * dim), "b_k": normal(groups * dim),
        "b_v": normal(groups * value_dim), "b_o": normal(width),
    }  # fmt: skip
    return Case(normal(batch * beams, tokens, width), normal(batch, keys, width), weights, heads, options)


def assert_equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance("fp64"), atol=tolerance("fp64"))


def padding(batch: int, keys: int) -> torch.Tensor:
    """Return a mask (B, 1, 1, S): one row without its first two keys, one without any key."""
    visible = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    visible[0, ..., :2] = False
    visible[-1] = False
    return visible


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"scale": 1.0},
    "softcap": {"softcap": 2.0},
    "sink": {"sink": torch.linspace(-1, 2, 4, dtype=F64)},
    "alibi": {"bias": Alibi(torch.linspace(0.1, 0.5, 4, dtype=F64)), "causal": True},
    "buckets": {"bias": RelativeBias(torch.linspace(-2, 2, 128, dtype=F64).view(32, 4).sin(), 16), "causal": True},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.arange(2) * 77},
    "rms": {"k_norm": Norm("rms", torch.linspace(0.5, 2, 4, dtype=F64)), "q_norm": Norm("rms")},
    "layer": {"k_norm": Norm("layer", torch.linspace(0.5, 2, 4, dtype=F64), torch.linspace(-1, 1, 4, dtype=F64))},
}
ALONE = [(name,) for name in OPTIONS]
TOGETHER = [
    ("layer", "sink", "softcap", "causal"),
    ("rms", "buckets", "dropout"),
    ("sink", "dropout"),
    ("layer", "softcap"),
]


@pytest.mark.parametrize("names", ALONE + TOGETHER, ids="+".join)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("tile", [4, 1000])
def test_equal_to_the_models_attention(names: tuple[str, ...], groups: int, tile: int) -> None:
    options = {key: value for name in names for key, value in OPTIONS[name].items()}
    made = case(groups=groups, value_dim=5, **options)
    assert_equal(made.el(tile=tile), made.dense())


@pytest.mark.parametrize("names", [("plain",), ("sink",), ("layer", "softcap"), ("dropout",)], ids="+".join)
def test_gradients(names: tuple[str, ...]) -> None:
    options = {key: value for name in names for key, value in OPTIONS[name].items()}
    made = case(groups=2, causal=True, **options)
    leaves = [made.x, made.hidden, *made.weights.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.randn_like(made.dense())
    for ours, dense in zip(
        torch.autograd.grad(made.el(tile=4), leaves, grad, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(made.dense(), leaves, grad, allow_unused=True, materialize_grads=True), strict=True,
    ):  # fmt: skip
        assert_equal(ours, dense)


@given(
    seed=st.integers(0, 1000), batch=st.integers(1, 3), beams=st.integers(1, 4), tokens=st.integers(1, 4),
    extra=st.integers(0, 9), ratio=st.sampled_from([1, 2, 4]), dim=st.integers(1, 6), tile=st.integers(1, 16),
    causal=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape(
    seed: int, batch: int, beams: int, tokens: int, extra: int, ratio: int, dim: int, tile: int, causal: bool
) -> None:
    made = case(
        seed=seed, batch=batch, beams=beams, tokens=tokens, keys=tokens + extra, groups=4 // ratio, dim=dim,
        value_dim=dim + 1, causal=causal,
    )  # fmt: skip
    assert_equal(made.el(tile=tile), made.dense())


def test_padding_and_rows_that_see_nothing() -> None:
    made = case(batch=3, mask=padding(3, 11))
    out = made.el(tile=4)
    assert_equal(out, made.dense())
    assert_equal(out[-1], made.weights["b_o"].expand_as(out[-1]))
    added = made.el(mask=torch.zeros(3, 1, 1, 11, dtype=F64).masked_fill(~padding(3, 11), -torch.inf), tile=4)
    assert_equal(added, out)


def test_the_key_bias_matters_only_beside_a_sink_or_under_a_cap() -> None:
    other = torch.randn(16, dtype=F64)
    plain, capped = case(), case(**OPTIONS["softcap"])
    assert torch.equal(plain.el(), plain.el(b_k=other))
    assert not torch.allclose(capped.el(), capped.el(b_k=other))


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("name", ["plain", "sink"])
def test_values_folded_into_the_output(name: str, groups: int) -> None:
    made = case(groups=groups, **OPTIONS[name])
    folded = fold_values(made.weights["w_v"], made.weights["w_o"], made.heads)
    assert folded.shape == (4, 12, 12)
    assert_equal(made.el(w_vo=folded), made.dense())


def test_cached_scales_give_the_same_norm() -> None:
    made = case(groups=2, **OPTIONS["layer"])
    w, norm = made.weights, OPTIONS["layer"]["k_norm"]
    parts = [key_scales(part, w["w_k"], w["b_k"], 2, norm) for part in made.hidden.split(3, 1)]
    assert_equal(made.el(scales=torch.cat(parts, 1), tile=4), made.dense())


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("name", ["plain", "sink", "softcap", "alibi", "buckets", "rms", "layer"])
def test_step_by_step_equals_at_once(name: str, groups: int) -> None:
    """A decoder that caches its inputs, and one number per normalised key and head, repeats its full forward."""
    made = case(tokens=9, keys=9, groups=groups, **(OPTIONS[name] | {"causal": True}))
    made.x, norm, w = made.hidden, OPTIONS[name].get("k_norm"), made.weights
    steps, scales = [], None
    for t in range(9):
        if norm is not None:
            new = key_scales(made.hidden[:, t : t + 1], w["w_k"], w["b_k"], groups, norm)
            scales = new if scales is None else torch.cat((scales, new), 1)
        step = dataclasses.replace(made, x=made.x[:, t : t + 1], hidden=made.hidden[:, : t + 1])
        steps.append(step.el(tile=4, scales=scales))
    assert_equal(torch.cat(steps, 1), made.dense())


def test_a_latent_with_a_decoupled_rotary_part_is_mla() -> None:
    """DeepSeek's attention, with keys and values computed in full."""
    make = torch.Generator().manual_seed(3)
    q, latent = (torch.randn(*s, generator=make, dtype=F64) for s in ((2, 4, 3, 5), (2, 7, 6)))
    w_k, w_v = (torch.randn(*s, generator=make, dtype=F64) for s in ((20, 6), (12, 6)))
    turned_q, turned_k = (torch.randn(*s, generator=make, dtype=F64) for s in ((2, 4, 3, 2), (2, 7, 2)))
    k = (latent @ w_k.T).unflatten(-1, (4, 5)).transpose(1, 2)
    v = (latent @ w_v.T).unflatten(-1, (4, 3)).transpose(1, 2)
    keys = torch.cat((k, turned_k[:, None].expand(-1, 4, -1, -1)), -1)
    dense = torch.softmax(torch.cat((q, turned_q), -1) @ keys.mT / 7**0.5, -1) @ v
    out = expanded_attention(q, latent, w_k, w_v, rotary=(turned_q, turned_k), tile=3)[0]
    assert_equal(out, dense)


@pytest.mark.parametrize("name", ["plain", "sink", "softcap"])
def test_parts_of_the_keys_merge_to_the_whole(name: str) -> None:
    """As for sharded contexts: each part contributes D + 1 numbers per query and head."""
    made = case(groups=2, keys=12)
    w, q = made.weights, torch.randn(2, 4, 3, 4, dtype=F64)
    options = {"b_k": w["b_k"], "b_v": w["b_v"]} | {k: v for k, v in OPTIONS[name].items() if k != "sink"}
    whole = expanded_attention(q, made.hidden, w["w_k"], w["w_v"], **options)
    parts = [expanded_attention(q, part, w["w_k"], w["w_v"], **options) for part in made.hidden.split((5, 4, 3), 1)]
    lse = torch.logsumexp(torch.stack([part[1] for part in parts]), 0)
    merged = sum(part[0] * torch.exp(part[1] - lse)[..., None] for part in parts)
    assert_equal(lse, whole[1])
    assert isinstance(merged, torch.Tensor)
    assert_equal(merged, whole[0])


def test_half_precision_keeps_its_sums_in_fp32() -> None:
    made = case(keys=4000, width=16)
    exact = made.el()
    low = Case(made.x.bfloat16(), made.hidden.bfloat16(), {n: w.bfloat16() for n, w in made.weights.items()}, 4, {})
    rounded = Case(low.x.double(), low.hidden.double(), {n: w.double() for n, w in low.weights.items()}, 4, {}).el()
    assert (low.el().double() - rounded).abs().max() <= tolerance("bf16 result") * rounded.abs().max()
    assert low.el().dtype == torch.bfloat16 and exact.dtype == F64


def test_what_cannot_be_is_refused_by_name() -> None:
    made = case()
    with pytest.raises(AttentionError, match="RoPE rotates each key by its position"):
        made.el(rotary=object())
    with pytest.raises(AttentionError, match="hidden's rows must divide"):
        dataclasses.replace(made, x=made.x[:1].repeat(3, 1, 1)).el()
    with pytest.raises(AttentionError, match="dropout_seed"):
        made.el(dropout_p=0.5)
    with pytest.raises(AttentionError, match="heads=3"):
        dataclasses.replace(made, heads=3).el()

"""The decode kernels, interpreted, against one query at a time in fp64: EL's, MLA's and grouped heads' shapes.

Memory that is not written is NaN (conftest.py), so a row, column or split that no program covers fails the test.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decode.test_el import OPTIONS, case, padding
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.decode.attend import decode_attention
from longctx.decode.norm import Norm
from longctx.decode.position import RelativeBias
from longctx.decode.sharded import attend_part
from longctx.kernels.decode import tiles

from tolerances import tolerance

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
Tensor = torch.Tensor


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


def slow(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: Any) -> tuple[Tensor, Tensor]:
    """out and lse in fp64, query by query: the definition."""
    rows, heads, tokens, _ = q.shape
    keys, offset = k.shape[2], options.get("q_offset", k.shape[2] - tokens)
    out, lse = torch.zeros(rows, heads, tokens, v.shape[3]).double(), torch.full((rows, heads, tokens), -torch.inf)
    lse, key = lse.double(), torch.arange(keys)
    for r, h, t in torch.cartesian_prod(torch.arange(rows), torch.arange(heads), torch.arange(tokens)).tolist():
        b, g = r // (rows // k.shape[0]), h // (heads // k.shape[1])
        s = k[b, g].double() @ q[r, h, t].double() * scale
        if options.get("softcap"):
            s = torch.tanh(s / options["softcap"]) * options["softcap"]
        if options.get("alibi") is not None:
            s = s - options["alibi"][h].double() * (offset + t - key).abs()
        visible = torch.ones(keys, dtype=torch.bool)
        if options.get("mask") is not None:
            row = options["mask"].expand(rows, heads, tokens, keys)[r, h, t]
            s, visible = (s, visible & row) if row.dtype == torch.bool else (s + row.double(), visible)
        if options.get("lengths") is not None:
            visible &= key < options["lengths"][b]
        if options.get("causal"):
            visible &= key <= offset + t
        s = s.masked_fill(~visible, -torch.inf)
        sink = options["sink"][h].double()[None] if options.get("sink") is not None else s[:0]
        if visible.any():
            out[r, h, t] = torch.softmax(torch.cat((s, sink)), 0)[:keys] @ v[b, g].double()
        lse[r, h, t] = torch.logsumexp(torch.cat((s, sink)), 0)
    return out, lse


def assert_equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], name: str) -> None:
    """To a tolerance of the largest value; a row without keys is (0, -inf) to the bit."""
    for a, b in zip(ours, theirs, strict=True):
        empty = b == -torch.inf
        assert torch.equal(a == -torch.inf, empty)
        a, b = a.double().masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)
        assert (a - b).abs().max() <= tolerance(name) * b.abs().max().clamp_min(1.0)


# (beams, query heads, key heads, Dk, Dv, whether values are columns of the keys)
SHAPES = {
    "el": (2, 3, 1, 40, 40, True),
    "el, wide": (1, 3, 1, 72, 72, True),
    "el, more rows than a tile": (3, 7, 1, 24, 24, True),
    "mla": (1, 4, 1, 40, 32, True),
    "mqa": (1, 4, 1, 16, 16, False),
    "gqa": (2, 4, 2, 17, 20, False),
    "one head": (1, 2, 2, 24, 40, False),
}


@settings(max_examples=14)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 2),
    st.sampled_from([1, 2, 15, 16, 17, 40, 70]),
    st.sampled_from(["", "mask", "bias", "lengths", "alibi", "softcap", "sink", "all"]),
    st.sampled_from([None, 1, 2, 5]),
    st.sampled_from(["fp32", "fp32", "fp16"]),
    st.integers(0, 2**16),
)
def test_one_query_at_a_time(
    shape: str, tokens: int, keys: int, option: str, splits: int | None, dtype: str, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    beams, heads, groups, d_k, d_v, same = SHAPES[shape]
    q = normal(g, 2 * beams, heads, tokens, d_k).to(DTYPES[dtype])
    k, v = (normal(g, 2, groups, keys, d).to(DTYPES[dtype]) for d in (d_k, d_v))
    made: dict[str, Any] = {
        "mask": torch.rand((2 * beams, 1, tokens, keys), generator=g) < 0.6,
        "bias": normal(g, heads, 1, keys),
        "lengths": torch.tensor([0, max(1, keys - 3)]),
        "alibi": torch.rand(heads, generator=g),
        "softcap": 1.5,
        "sink": normal(g, heads),
    }
    made["mask"][0] = False
    chosen = {name: x for name, x in made.items() if option in (name, "all") and not (option == "all" == name)}
    if "bias" in chosen and "mask" in chosen:
        del chosen["bias"]
    if "bias" in chosen:
        chosen["mask"] = chosen.pop("bias")
    options = {"scale": 0.3, "causal": keys >= tokens, **chosen}
    given_v = {"value_width": d_v} if same else {"v": v}
    truth = slow(q, k, k[..., :d_v] if same else v, **options)
    ours = decode_attention(q, k, **given_v, **options, backend="triton", splits=splits)
    assert_equal(ours, truth, dtype)
    assert_equal(decode_attention(q, k, **given_v, **options, backend="torch"), truth, "fp32")


def test_splits_differ_by_rounding_and_runs_not_at_all() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = normal(g, 2, 4, 1, 40), normal(g, 1, 1, 90, 40)
    mask = torch.ones(1, 1, 1, 90, dtype=torch.bool)
    mask[..., 32:64] = False  # a split without a visible key
    results = [decode_attention(q, k, mask=mask, backend="triton", splits=n) for n in (1, 2, 3, 6, 6)]
    for out, lse in results[1:]:
        assert_equal((out, lse), (results[0][0].double(), results[0][1].double()), "fp32")
    assert all(torch.equal(a, b) for a, b in zip(*results[-2:], strict=True))


def test_no_key_at_all() -> None:
    q, k = torch.randn(2, 2, 1, 16), torch.zeros(1, 1, 0, 16)
    for backend in ("triton", "torch"):
        out, lse = decode_attention(q, k, backend=backend)
        assert not out.any() and bool((lse == -torch.inf).all())
        out, lse = decode_attention(q, k, sink=torch.tensor([0.5, 1.0]), backend=backend)
        assert not out.any() and torch.equal(lse[0, :, 0], torch.tensor([0.5, 1.0]))


def single(x: Any) -> Any:
    """An option in fp32."""
    if isinstance(x, Norm):
        return replace(x, weight=single(x.weight), bias=single(x.bias))
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("names", [*((name,) for name in OPTIONS if name != "dropout"), ("layer", "sink", "softcap")])
def test_el(names: tuple[str, ...]) -> None:
    """All terms that EL-attention adds to the product, with beams, padding and a row that sees no key."""
    options: dict[str, Any] = {}
    for name in names:
        options |= OPTIONS[name]
    if "buckets" in names:
        options["bias"] = RelativeBias(options["bias"].table, 40)
    keys, beams = 19, 2
    options["mask"] = padding(2, keys).repeat_interleave(beams, 0)
    made = case(batch=2, beams=beams, tokens=1, keys=keys, **options)
    truth = made.dense()
    made.x, made.hidden = made.x.float(), made.hidden.float()
    made.weights = {name: w.float() for name, w in made.weights.items()}
    made.options = {name: single(x) for name, x in made.options.items()}
    ours = made.el(backend="triton")
    assert (ours.double() - truth).abs().max() <= 10 * tolerance("fp32") * truth.abs().max().clamp_min(1.0)
    assert torch.allclose(ours, made.el(backend="torch"), atol=1e-4)


@pytest.mark.parametrize("name", ["causal", "alibi", "buckets"])
def test_el_over_keys_that_stand_anywhere(name: str) -> None:
    made = case(keys=19, **OPTIONS[name])
    if name == "buckets":
        made.options["bias"] = RelativeBias(made.options["bias"].table, 40)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    truth = made.dense()
    made.x, made.hidden = made.x.float(), made.hidden.float()[:, order]
    made.weights = {name: w.float() for name, w in made.weights.items()}
    ours = made.el(backend="triton", key_positions=order, q_offset=16, mask=torch.ones(19, dtype=torch.bool))
    assert (ours.double() - truth).abs().max() <= 10 * tolerance("fp32") * truth.abs().max().clamp_min(1.0)


def test_a_part_of_a_sharded_context() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = normal(g, 2, 4, 2, 16), normal(g, 2, 2, 37, 16), normal(g, 2, 2, 37, 24)
    visible = torch.rand((2, 2, 37), generator=g) < 0.5
    visible[1, 0] = False
    for options in ({}, {"softcap": 2.0, "sink": normal(g, 4), "scale": 0.2}):
        ours, theirs = (attend_part(q, k, v, visible, **options, backend=name) for name in ("triton", "torch"))
        assert_equal(ours, (theirs[0].double(), theirs[1].double()), "fp32")
    ours = attend_part(q, k[:, :, :0], v[:, :, :0], visible[..., :0], backend="triton")
    assert not ours[0].any() and bool((ours[1] == -torch.inf).all())


@given(st.integers(1, 500), st.integers(0, 10**6), st.sampled_from([16, 32, 64]), st.integers(1, 200))
def test_splits_fill_the_processors_and_no_more(units: int, keys: int, step: int, processors: int) -> None:
    found = tiles.splits(units, keys, step, processors)
    assert found == 1 or (units * found <= processors and keys // found >= 4 * step)
    if 1 < found < min(processors // units, 256):
        assert keys < 4 * step * (found + 1)


@pytest.mark.parametrize("arch", [*tiles.ARCHES, "sm_120", "interpreter"])
def test_tiles_cover_every_width(arch: str) -> None:
    for itemsize in (2, 4):
        for width in (1, 64, 100, 192, 576, 768, 1280, 1600, 2048, 5120, 12288):
            for rows in (1, 17, 500):
                config = tiles.choose(rows, width, width, True, itemsize, rows > 1, arch)
                assert config.rows >= 16 and config.step >= 16
                assert not config.kept or config.values * config.width >= width
                assert config.rows * config.values * config.width <= 32768

"""EL-attention over any part of a context with `key_positions`, against attention over the whole context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode.test_el import OPTIONS, TOGETHER, Case, assert_equal, case
from hypothesis import given, settings
from hypothesis import strategies as st

import longctx
from longctx.decode.el import el_attention, expanded_attention
from longctx.decode.position import RelativeBias
from longctx.errors import AttentionError
from longctx.sharding import positions

from distributed import run_ranks
from tolerances import tolerance

CASES = [("causal",), ("alibi",), ("buckets",), ("dropout",), ("sink", "buckets"), ("softcap", "alibi"), *TOGETHER]
SEVERAL = {"beams": 2, "groups": 2, "keys": 21, "value_dim": 5}


def case_with(names: tuple[str, ...], **shape: Any) -> Case:
    options = {key: value for name in names for key, value in OPTIONS[name].items()}
    if "buckets" in names:  # that option has a table for shorter distances
        options["bias"] = RelativeBias(options["bias"].table, 40)
    if "dropout_seed" in options:
        options["dropout_seed"] = torch.arange(shape.get("batch", 2) * shape.get("beams", 1)) * 77
    return case(**shape, **options)


def merged(made: Case, parts: list[torch.Tensor], **changes: Any) -> torch.Tensor:
    """Return the partial results over each part of the keys, merged by their lse."""
    options = made.options | changes
    w, heads, sink = made.weights, made.heads, options.pop("sink", None)
    q = torch.nn.functional.linear(made.x, w["w_q"], w["b_q"]).unflatten(-1, (heads, -1))
    norm = options.pop("q_norm", None)
    q = (q if norm is None else norm(q)).transpose(1, 2)
    offset = made.hidden.shape[1] - made.x.shape[1]
    partials = [
        expanded_attention(
            q, made.hidden[:, part], w["w_k"], w["w_v"], b_k=w["b_k"], b_v=w["b_v"], key_positions=part,
            q_offset=offset, sink=None if sink is None else sink if one == 0 else torch.full_like(sink, -1e300),
            **options,
        )[:2]
        for one, part in enumerate(parts)
    ]  # fmt: skip
    lse = torch.logsumexp(torch.stack([part[1] for part in partials]), 0)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    out = torch.stack([part[0] * torch.exp(part[1] - lse)[..., None] for part in partials]).sum(0)
    return torch.nn.functional.linear(out.transpose(1, 2).flatten(2), w["w_o"], w["b_o"])


@pytest.mark.parametrize("names", CASES, ids="+".join)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 21), max_size=3), tile=st.sampled_from([2, 5, 1000]))
@settings(max_examples=8, deadline=None)
def test_keys_split_in_any_order(names: tuple[str, ...], seed: int, cuts: list[int], tile: int) -> None:
    """Including empty parts and parts after the query."""
    made = case_with(names, **SEVERAL, seed=seed)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(seed))
    assert_equal(merged(made, list(order.tensor_split(sorted(cuts))), tile=tile), made.dense())


def errors(rank: int, world: int, layouts: list[str]) -> list[float]:
    """Return the largest differences of el_attention over the ranks' parts of a context from one process."""
    mesh, found = longctx.Mesh(ring=world), []
    for layout in layouts:
        places = positions(24, mesh, layout)
        for names in CASES:
            made = case_with(names, **(SEVERAL | {"keys": 24}))
            here = el_attention(
                made.x, made.hidden[:, places], **made.weights, heads=4, **made.options, key_positions=places,
                q_offset=21, mesh=mesh, tile=4,
            )  # fmt: skip
            found.append(float((here - made.dense()).abs().max()))
    return found


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.deep)])
def test_parts_on_a_ring(world: int) -> None:
    """In the layouts of ring attention."""
    results = run_ranks(world, errors, ["zigzag", "contiguous", "striped"], timeout=120)
    assert max(max(result) for result in results) <= tolerance("fp64")
    assert len(results[0]) == 3 * len(CASES)


def test_biases_are_computed_tile_by_tile() -> None:
    pairs: list[int] = []

    def bias(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        pairs.append(len(queries) * len(keys))
        return -0.1 * (queries[:, None] - keys[None, :]).abs().to(torch.float64)

    made = case(keys=21, bias=bias, causal=True)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    found = merged(made, list(order.tensor_split(3)), tile=4)
    assert max(pairs) == 3 * 4 and sum(pairs) == 3 * 21
    assert_equal(found, made.dense())


def test_positions_that_do_not_fit_are_rejected() -> None:
    made, two = case(), longctx.Mesh(ring=2, world_size=2)
    with pytest.raises(AttentionError, match=r"expected one integer per row of hidden, \(11,\)"):
        made.el(key_positions=torch.arange(10), q_offset=3)
    with pytest.raises(AttentionError, match="expected one integer"):
        made.el(key_positions=torch.arange(11.0), q_offset=3)
    with pytest.raises(AttentionError, match="key_positions without q_offset"):
        made.el(key_positions=torch.arange(11))
    for option in ({"causal": True}, OPTIONS["alibi"], OPTIONS["dropout"]):
        with pytest.raises(AttentionError, match="as key_positions, and the first query's as q_offset"):
            made.el(**option, mesh=two)
    with pytest.raises(AttentionError, match="exchanged at full width"):
        made.el(w_vo=torch.ones(4, 12, 12), mesh=two)

"""A call that starts from a state and returns one, with a loss on both results: one device compared with ranks."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from bounded import direct, ranks

from longctx.attention.comm import Link

from tolerances import tolerance

EXACT = tolerance("fp64")
BEFORE, LENGTH = 13, 48
DOCUMENTS = {
    "none": None,
    "packed": direct.packed([[(-1, 3), (4, 27), (5, 26), (-1, 5)], [(2, 5), (3, 8), (7, 48)]]),
}


def cut(name: str, leaves: list[torch.Tensor], here: Any) -> list[torch.Tensor]:
    """Return some tokens of the tensors that have them; the others are whole."""
    return [x[:, :, here] if place < 3 or ranks.CASES[name].local else x for place, x in enumerate(leaves)]


def floating(state: Any) -> dict[str, torch.Tensor]:
    values = ((field.name, getattr(state, field.name)) for field in fields(state))
    return {name: x for name, x in values if x is not None and x.is_floating_point()}


def vector(
    name: str,
    leaves: list[torch.Tensor],
    weight: torch.Tensor,
    ids: torch.Tensor | None,
    state: Any,
    share: int,
    layout: str = "zigzag",
    link: Link | None = None,
    mesh: Any = None,
) -> tuple[torch.Tensor, Any, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Return out, the state after, and gradients of the leaves and of the state before; the loss is on both results."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    given = {field: x.detach().clone().requires_grad_() for field, x in floating(state).items()}
    out, after = ranks.call(
        name, leaves, ids, layout, link, mesh=mesh, state=replace(state, **given), return_state=True
    )  # type: ignore[misc]
    loss = (out * weight).sum()
    summed = "sum" in name or name == "linformer"  # there the mass only tells which slots were written
    for seed, (field, x) in enumerate(floating(after).items()):
        if summed and field == "log_mass":
            continue
        g = torch.Generator().manual_seed(seed)
        loss = loss + (x * torch.randn(x.shape, generator=g, dtype=x.dtype))[x.isfinite()].sum() / share
    found = list(torch.autograd.grad(loss, [*leaves, *given.values()], allow_unused=True))
    return out.detach(), after.detach(), found[: len(leaves)], found[len(leaves) :]


def setting(name: str, documents: str) -> Any:
    """Return the leaves and documents after the first tokens, the state of these, and a weight for the output."""
    leaves, weight = ranks.inputs(name, BEFORE + LENGTH)
    ids = DOCUMENTS[documents]
    first = None if ids is None else ids[:, :BEFORE]
    start = cut(name, leaves, slice(0, BEFORE))
    _, state = ranks.call(name, start, first, "zigzag", None, return_state=True)  # type: ignore[misc]
    rest = slice(BEFORE, None)
    return cut(name, leaves, rest), None if ids is None else ids[:, rest], state, weight[:, :, rest]


def check(name: str, expected: Any, found: list[Any], order: torch.Tensor) -> None:
    """Compare outputs and gradients in order, summed gradients of replicated tensors, and states on every rank."""
    out, after, gradients, first = expected
    outs, afters, all_gradients, firsts = zip(*found, strict=True)
    assert direct.differences([torch.cat(outs, 2)[:, :, order]], [out])[0] <= EXACT
    for place, wanted in enumerate(gradients):
        parts = [here[place] for here in all_gradients]
        sharded = place < 3 or ranks.CASES[name].local
        ours = torch.cat(parts, 2)[:, :, order] if sharded else sum(parts)
        assert direct.differences([ours], [wanted])[0] <= EXACT, place
    for place, wanted in enumerate(first):
        given = [here[place] for here in firsts if here[place] is not None]
        assert direct.differences([sum(given) if given else None], [wanted])[0] <= EXACT, place
    for ours in afters:
        for field in fields(after):
            a, b = getattr(ours, field.name), getattr(after, field.name)
            assert (a is None) == (b is None), field.name
            if a is not None and a.is_floating_point():
                assert a.isfinite().equal(b.isfinite())
                assert direct.differences([a.nan_to_num(neginf=0.0)], [b.nan_to_num(neginf=0.0)])[0] <= EXACT
            elif a is not None:
                assert a.equal(b), field.name

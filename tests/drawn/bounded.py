"""Random calls of ABC, its queues and Cottention: documents, any padding, states passed from call to call, any ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from drawn import definitions
from drawn.draw import Draw, global_indices, normal, worst

from longctx.attention import simulate
from longctx.attention.comm import Link
from longctx.bounded import walk
from longctx.bounded.abc import control
from longctx.bounded.abc import operator as abc
from longctx.bounded.arguments import SequenceCall
from longctx.bounded.cosine import operator as cosine

from tolerances import tolerance

CAUSAL = (
    "prefix", "prefix pair", "running", "running pair", "random", "random running", "random sum", "linformer",
    "identity", "window", "dilated", "compressive", "cosine value", "cosine query",
)  # fmt: skip
WHOLE = ("global", "global pair", "random sum", "cosine query")
SCALE = 0.6


@dataclass(frozen=True)
class BoundedCase:
    """One sequence. rings: (tokens per rank, ranks) of each part, which starts from the state after the part before.

    ids: per row, or None. logits: how control logits are drawn. slots, rate: of the control. chunk: of the chunked
    form. holes: what padding holds.
    """

    seed: int
    name: str
    causal: bool
    rings: tuple[tuple[int, int], ...]
    layout: str
    heads: tuple[int, int]
    widths: tuple[int, int]
    slots: int
    rate: int
    logits: str
    ids: tuple[tuple[int, ...], ...] | None
    holes: float
    chunk: int
    dtype: torch.dtype

    @property
    def length(self) -> int:
        return sum(tokens * ring for tokens, ring in self.rings)


def draw(seed: int) -> BoundedCase:
    d = Draw(seed)
    causal = d.chance(0.8)
    name = d.pick(*CAUSAL) if causal else d.pick(*WHOLE)
    layout = d.pick("contiguous", "zigzag")
    parts = d.pick(1, 1, 2, 3) if causal else 1
    rings = tuple((d.whole(1, 9) * (2 if layout == "zigzag" else 1), d.pick(1, 1, 2, 3, 4)) for _ in range(parts))
    length = sum(tokens * ring for tokens, ring in rings)
    groups = d.whole(1, 2)
    dtype = d.pick(torch.float64, torch.float64, torch.float32)
    return BoundedCase(
        seed, name, causal, rings, layout, (groups * d.whole(1, 3), groups), (d.whole(1, 6), d.whole(1, 5)),
        d.whole(1, 6), d.whole(1, 4), d.pick("plain", "some nothing", "nothing or much"),
        tuple(d.row(length) for _ in range(2)) if d.chance(0.7) else None,
        d.pick(0.0, float("nan")), d.pick(1, 3, 8, 64), dtype,
    )  # fmt: skip


def inputs(case: BoundedCase) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return [q, k, v, inputs of the control...] and a weight for the output."""
    (h, g), (d, dv), t = case.heads, case.widths, case.length
    shapes: list[tuple[int, ...]] = [(2, h, t, d), (2, g, t, d), (2, g, t, dv)]
    if "cosine" in case.name:
        shapes.append((h,))
    elif case.name == "linformer":
        shapes.append((g, case.slots, t + 3))
    elif learned(case):
        shapes += [(2, g, t, case.slots)] * (2 if "pair" in case.name else 1)
    made = [normal(1000 * case.seed + place, *shape) for place, shape in enumerate(shapes)]
    if learned(case) and case.logits != "plain":
        for place in range(3, len(made)):
            chosen = normal(1000 * case.seed + 50 + place, *made[place].shape)
            made[place] = made[place].masked_fill(chosen > 0.5, -torch.inf)
            if case.logits == "nothing or much":
                # Other weights underflow beside e^800, in fp64 as well; the error of fp32 grows with the logits.
                made[place] = made[place] + (800.0 if case.dtype == torch.float64 else 20.0) * (chosen < -1.0)
    if case.ids is not None:
        absent = (torch.tensor(case.ids) < 0)[:, None, :, None]
        for place, x in enumerate(made):
            if x.dim() == 4 and case.holes != 0:
                made[place] = x.masked_fill(absent, case.holes)
    return made, normal(1000 * case.seed + 99, 2, h, t, dv)


def learned(case: BoundedCase) -> bool:
    return case.name.split()[0] in ("prefix", "running", "global")


def expected(case: BoundedCase) -> list[torch.Tensor]:
    made, weight = inputs(case)
    leaves = [x.to(case.dtype).double().requires_grad_() for x in made]
    rows = [tuple([0] * case.length)] * 2 if case.ids is None else list(case.ids)
    out = definitions.by_document(rows, _by_token(case, leaves), _definition(case, leaves), torch.zeros_like(weight))
    return [out, *_gradients(out, weight, leaves)]


def _by_token(case: BoundedCase, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors with a token dimension; the definition looks up linformer's columns."""
    return [x for x in leaves if x.dim() == 4]


def _definition(case: BoundedCase, leaves: list[torch.Tensor]) -> Any:
    name, slots, groups = case.name, case.slots, case.heads[1]
    if "cosine" in name:
        scale_on = name.split()[1]
        return lambda q, k, v: definitions.cosine(q, k, v, leaves[3], scale_on, case.causal)
    queues = {
        "window": definitions.window(slots),
        "dilated": definitions.dilated(slots, case.rate),
        "compressive": definitions.compressive(slots, case.rate),
    }
    if name in queues:
        return lambda q, k, v: definitions.queue(q, k, v, queues[name], SCALE)
    normalizer = "sum" if name in ("linformer", "identity") or "sum" in name else "prefix"
    normalizer = "running" if "running" in name else normalizer

    def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *controls: torch.Tensor) -> torch.Tensor:
        count = q.shape[2]
        if name == "linformer":
            controls = (leaves[3][None, :, :, :count].transpose(2, 3),)
        elif name == "identity":
            controls = (torch.eye(count).double().expand(1, groups, -1, -1),)
        elif not controls:
            slot = [[definitions.random_slot(g, i, 5, slots) for i in range(count)] for g in range(groups)]
            member = torch.nn.functional.one_hot(torch.tensor(slot), slots).double()[None]
            controls = (member if normalizer == "sum" else member.log(),)
        return definitions.abc(q, k, v, controls[0], controls[-1], normalizer, SCALE, case.causal)

    return alone


def _gradients(out: torch.Tensor, weight: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    found: Any = [None] * len(leaves)
    if out.requires_grad:  # else all tokens are padding
        found = torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def found(case: BoundedCase) -> list[torch.Tensor]:
    """Return the same from the library: part after part, each on its own simulated ring."""
    made, weight = inputs(case)
    leaves = [x.to(case.dtype).requires_grad_() for x in made]
    if len(case.rings) == 1 and case.rings[0][1] > 1:
        return _chunked(case, lambda: _on_ring(case, leaves, weight))
    return _chunked(case, lambda: _in_parts(case, leaves, weight))


def _chunked(case: BoundedCase, run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """Run with chunks of the case's size."""
    size = walk.CHUNK
    walk.CHUNK = case.chunk
    try:
        return run()
    finally:
        walk.CHUNK = size


def _in_parts(case: BoundedCase, leaves: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """Compute part after part, passing the state; gradients only if no part is on a ring."""
    state, start, outs = None, 0, []
    differentiated = all(ring == 1 for _, ring in case.rings)
    leaves = leaves if differentiated else [x.detach() for x in leaves]
    for part, (tokens, ring) in enumerate(case.rings):
        stop = start + tokens * ring
        out, state = _part(case, leaves, slice(start, stop), ring, state, part < len(case.rings) - 1)
        outs.append(out)
        start = stop
    out = torch.cat(outs, 2)
    return [out, *_gradients(out, weight, leaves)] if differentiated else [out]


def _on_ring(case: BoundedCase, leaves: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """Run one ring; each rank runs backward from its own tokens, since backward is a collective as well."""
    index = [torch.tensor(own) for own in global_indices(case.layout, case.rings[0][1], case.length)]

    def worker(link: Link) -> list[torch.Tensor]:
        return _of_rank(case, index[link.rank], leaves, weight, link, None)

    return assembled(case, simulate.run(case.rings[0][1], worker)[0])


def _of_rank(
    case: BoundedCase, here: Any, leaves: list[torch.Tensor], weight: torch.Tensor, link: Link | None, mesh: Any
) -> list[torch.Tensor]:
    ids = None if case.ids is None else torch.tensor(case.ids)[:, here]
    local = [(x[:, :, here] if _has_tokens(case, place) else x).detach() for place, x in enumerate(leaves)]
    local = [x.clone().requires_grad_() for x in local]
    out, _ = _call(case, local, ids, link, None, False, mesh)
    return [out.detach(), *_gradients(out, weight[:, :, here], local)]


def of_rank(case: BoundedCase, mesh: Any) -> list[torch.Tensor]:
    """Return one process's result for a case of one part."""
    made, weight = inputs(case)
    here = global_indices(case.layout, case.rings[0][1], case.length)[mesh.ring_rank]
    return _chunked(case, lambda: _of_rank(case, here, [x.to(case.dtype) for x in made], weight, None, mesh))


def has_two_ranks(case: BoundedCase) -> bool:
    return len(case.rings) == 1 and case.rings[0][1] == 2


def assembled(case: BoundedCase, answers: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the ranks' results in the order of the sequence; gradients of replicated weights are summed."""
    index = global_indices(case.layout, case.rings[0][1], case.length)
    order = torch.tensor([place for here in index for place in here]).argsort()
    return [
        torch.cat(parts, 2)[:, :, order] if _has_tokens(case, place - 1) else torch.stack(parts).sum(0)
        for place, parts in enumerate(zip(*answers, strict=True))
    ]


def _has_tokens(case: BoundedCase, place: int) -> bool:
    """Return whether an input (-1: the output) is sharded over the ranks; the others are replicated weights."""
    return place < 3 or learned(case)


def _part(
    case: BoundedCase, leaves: list[torch.Tensor], here: slice, ring: int, state: Any, wanted: bool
) -> tuple[torch.Tensor, Any]:
    """Return out of some tokens and the state after them, by one rank or several."""
    local = [x[:, :, here] if x.dim() == 4 else x for x in leaves]
    ids = None if case.ids is None else torch.tensor(case.ids)[:, here]
    if ring == 1:
        return _call(case, local, ids, None, state, wanted)
    index = [torch.tensor(own) for own in global_indices(case.layout, ring, here.stop - here.start)]
    given = [[x[:, :, own] if x.dim() == 4 else x for x in local] for own in index]

    def worker(link: Link) -> tuple[torch.Tensor, Any]:
        own = None if ids is None else ids[:, index[link.rank]]
        return _call(case, given[link.rank], own, link, state, wanted)

    answers, _ = simulate.run(ring, worker)
    order = torch.cat(index).argsort()
    return torch.cat([out for out, _ in answers], 2)[:, :, order], answers[-1][1]


def _call(
    case: BoundedCase,
    local: list[torch.Tensor],
    ids: torch.Tensor | None,
    link: Link | None,
    state: Any,
    wanted: bool,
    mesh: Any = None,
) -> tuple[torch.Tensor, Any]:
    q, k, v, *others = local
    shared = SequenceCall(
        causal=case.causal, mesh=mesh, layout=case.layout, document_ids=ids, state=state, return_state=wanted,
        backend="chunked", link=link,
    )  # fmt: skip
    if "cosine" in case.name:
        result: Any = cosine.attend(q, k, v, others[0], shared, scale_on=case.name.split()[1])
    else:
        chosen: Any = {
            "random": lambda: control.random(case.slots, 5), "linformer": lambda: control.linformer(others[0]),
            "identity": lambda: control.identity(case.length + 1), "window": lambda: control.window(case.slots),
            "dilated": lambda: control.dilated(case.slots, case.rate),
            "compressive": lambda: control.compressive(case.slots, case.rate),
        }.get(case.name.split()[0], lambda: others[0] if len(others) == 1 else tuple(others))()  # fmt: skip
        normalizer = "running" if "running" in case.name else "prefix"
        normalizer = "sum" if "sum" in case.name or case.name in ("linformer", "identity") else normalizer
        result = abc.attend(q, k, v, chosen, shared, normalizer=normalizer, scale=SCALE)
    return result if wanted else (result, None)


def check(case: BoundedCase) -> tuple[float, float]:
    """Return the largest error and the tolerance."""
    return compared(case, found(case))


def compared(case: BoundedCase, answer: list[torch.Tensor]) -> tuple[float, float]:
    """Compare a result, which may lack the gradients; return the largest error and the tolerance."""
    allowed = tolerance("fp64" if case.dtype == torch.float64 else "fp32")
    return worst(answer, expected(case)[: len(answer)]), allowed

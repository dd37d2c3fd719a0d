"""Random calls of ring attention: any layout, mask, documents, padding and extras, on simulated ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from attention.dense import kept
from drawn import definitions
from drawn.draw import LAYOUTS, Draw, global_indices, normal, worst

from longctx import ring_attention
from longctx.attention import simulate
from longctx.attention import sink as sinks
from longctx.attention.backends import aten
from longctx.attention.backends.base import BackwardQueries
from longctx.attention.backends.choose import choose_backend
from longctx.attention.band import make_rule
from longctx.attention.comm import Link
from longctx.attention.passes import Passes, split
from longctx.attention.scores import Scores

from tolerances import tolerance


@dataclass(frozen=True)
class RingCase:
    """One call. tokens: per rank; ids: per row, or None; sink and alibi: per head; at_once: see `aten.MIN_WORK`."""

    seed: int
    ring: int
    layout: str
    tokens: int
    heads: tuple[int, int]
    widths: tuple[int, int]
    causal: bool
    window: Any
    ids: tuple[tuple[int, ...], ...] | None
    length: int | None
    scale: float
    softcap: float | None
    sink: tuple[float, ...] | None
    alibi: tuple[float, ...] | None
    dropout: float
    backend: str
    at_once: int
    dtype: torch.dtype


def draw(seed: int) -> RingCase:
    d = Draw(seed)
    ring, layout = d.whole(1, 4), d.pick(*LAYOUTS)
    tokens = d.whole(1, 24) * (2 if layout == "zigzag" else 1)
    length = tokens * ring
    groups = d.whole(1, 3)
    heads = (groups * d.whole(1, 3), groups)
    softcap = d.pick(None, None, None, 1.5)
    alibi = tuple(d.pick(0.0, 0.1, 0.7) for _ in range(heads[0])) if d.chance(0.2) else None
    dropout = d.pick(0.0, 0.0, 0.0, 0.4)
    plain = softcap is None and alibi is None and not dropout
    sizes, dtype = d.whole(1, length), d.pick(torch.float64, torch.float64, torch.float32)
    large = 30.0 if dtype == torch.float64 else 2.0  # an error of fp32 grows with the logits
    return RingCase(
        seed, ring, layout, tokens, heads, (d.whole(1, 7), d.whole(1, 7)), d.chance(0.7),
        d.pick(None, None, sizes, (d.whole(0, length), d.whole(0, length)), (d.whole(0, length), None)),
        tuple(d.row(length) for _ in range(2)) if d.chance(0.6) else None,
        d.whole(1, length) if d.chance(0.3) else None,
        d.pick(0.5, 0.5, 0.5, -0.7, 0.0, large), softcap,
        tuple(d.pick(-torch.inf, -1.0, 0.5, 3.0) for _ in range(heads[0])) if d.chance(0.3) else None,
        alibi, dropout, d.pick("aten", "reference") if plain else "reference", d.pick(1, 1 << 22), dtype,
    )  # fmt: skip


def visible(case: RingCase) -> torch.Tensor:
    """Return the mask (2, T, T) bool, pair by pair."""
    length = case.tokens * case.ring
    left = right = None
    if isinstance(case.window, tuple):
        left, right = case.window
    elif case.window is not None:
        left = case.window - 1
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = torch.ones(2, length, length, dtype=torch.bool)
    if case.causal:
        seen &= j <= i
    if left is not None:
        seen &= i - j <= left
    if right is not None:
        seen &= j - i <= right
    if case.length is not None:
        seen &= (i < case.length) & (j < case.length)
    if case.ids is not None:
        seen &= definitions.same_document(torch.tensor(case.ids))
    return seen


def inputs(case: RingCase) -> list[torch.Tensor]:
    """Return [q, k, v, dout, dlse]."""
    (h, g), (dk, dv), t = case.heads, case.widths, case.tokens * case.ring
    shapes = (2, h, t, dk), (2, g, t, dk), (2, g, t, dv), (2, h, t, dv), (2, h, t)
    return [normal(1000 * case.seed + place, *shape) for place, shape in enumerate(shapes)]


def expected(case: RingCase) -> list[torch.Tensor]:
    q, k, v, dout, dlse = (x.to(case.dtype).double() for x in inputs(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sink, alibi = (None if x is None else torch.tensor(x).double().requires_grad_() for x in (case.sink, case.alibi))
    call = leaves, visible(case), case.scale, case.softcap, sink, alibi
    out, lse = definitions.attention(*call[0], *call[1:])
    if case.dropout:
        out = _dropped(case, out, lse, *call)
    leaves += [x for x in (sink, alibi) if x is not None]
    blind = lse == -torch.inf
    loss = (out * dout).sum() + (lse.masked_fill(blind, 0.0) * dlse).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def _dropped(case: RingCase, out: torch.Tensor, lse: torch.Tensor, leaves: Any, seen: Any, *more: Any) -> torch.Tensor:
    """Return the output with dropout, from the undropped probabilities; attending to unit vectors gives these."""
    q, k, v = leaves
    unit = torch.eye(k.shape[2]).double().expand(2, k.shape[1], -1, -1)
    p = definitions.attention(q, k, unit, seen, *more)[0]
    index = torch.arange(k.shape[2])
    keep = kept(seeds(case), q.shape[1], index, index, case.dropout)
    return (p * keep / (1 - case.dropout)) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)


def seeds(case: RingCase) -> torch.Tensor:
    return torch.tensor([case.seed * 7919, -case.seed - 1])


def found(case: RingCase) -> list[torch.Tensor]:
    """Return the same from the library's passes, one thread per rank."""
    tensors = [x.to(case.dtype) for x in inputs(case)]
    rule = make_rule(case.causal, case.window, case.length)
    sink, alibi = (None if x is None else torch.tensor(x).to(case.dtype) for x in (case.sink, case.alibi))
    dropout = (case.dropout, seeds(case) if case.dropout else None)
    scores = Scores(case.scale, case.softcap, alibi, *dropout)
    index = [torch.tensor(here) for here in global_indices(case.layout, case.ring, case.tokens * case.ring)]

    def worker(link: Link) -> tuple[torch.Tensor, ...]:
        here = index[link.rank]
        q, k, v, dout, dlse = (x[:, :, here] for x in tensors)
        ids = None if case.ids is None else torch.tensor(case.ids)[:, here]
        passes = Passes(link, case.layout, rule, scores, choose_backend(case.backend, q, v, scores))
        out, lse = passes.forward(q, k, v, ids, sink)
        rows = BackwardQueries(q, out, lse, dout, dlse.masked_fill(lse == -torch.inf, 0.0))
        dq, dkv, dalibi = passes.backward(rows, k, v, ids)
        per_head = [x for x in (None if sink is None else sinks.gradient(rows, sink), dalibi) if x is not None]
        return out, lse, dq, *split(dkv, k, v), *per_head

    with at_once(case):
        return assembled(case, simulate.run(case.ring, worker)[0])


@contextmanager
def at_once(case: RingCase) -> Iterator[None]:
    """Let the fused operator compute as many heads per call as the case says."""
    least, aten.MIN_WORK = aten.MIN_WORK, case.at_once
    try:
        yield
    finally:
        aten.MIN_WORK = least


def has_two_ranks(case: RingCase) -> bool:
    return case.ring == 2


def assembled(case: RingCase, answers: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the ranks' results in the order of the sequence; gradients per head are summed."""
    index = global_indices(case.layout, case.ring, case.tokens * case.ring)
    order, parts = torch.tensor([place for here in index for place in here]).argsort(), list(zip(*answers, strict=True))
    whole = [torch.cat(pieces, 2)[:, :, order] for pieces in parts[:5]]
    return whole + [torch.stack(pieces).sum(0) for pieces in parts[5:]]


def of_rank(case: RingCase, mesh: Any) -> list[torch.Tensor]:
    """Return one process's result, by the public function and autograd."""
    here = global_indices(case.layout, case.ring, case.tokens * case.ring)[mesh.ring_rank]
    q, k, v, dout, dlse = (x.to(case.dtype)[:, :, here] for x in inputs(case))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    sink, alibi = (
        None if x is None else torch.tensor(x).to(case.dtype).requires_grad_() for x in (case.sink, case.alibi)
    )
    ids = None if case.ids is None else torch.tensor(case.ids)[:, here]
    with at_once(case):
        out, lse = ring_attention(
            *leaves, mesh=mesh, causal=case.causal, layout=case.layout, window=case.window, document_ids=ids,
            length=case.length, scale=case.scale, softcap=case.softcap, sink=sink, alibi=alibi,
            dropout_p=case.dropout, dropout_seed=seeds(case) if case.dropout else None, return_lse=True,
            backend=case.backend,
        )  # fmt: skip
        loss = (out * dout).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse).sum()
        gradients = torch.autograd.grad(loss, leaves + [x for x in (sink, alibi) if x is not None])
    return [out.detach(), lse.detach(), *gradients]


def check(case: RingCase) -> tuple[float, float]:
    """Return the largest error and the tolerance."""
    return compared(case, found(case))


def compared(case: RingCase, answer: list[torch.Tensor]) -> tuple[float, float]:
    return worst(answer, expected(case)), tolerance("fp64" if case.dtype == torch.float64 else "fp32")

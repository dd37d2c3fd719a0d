"""The same call on one device and on a ring, simulated or of processes: shard, run every rank, reassemble."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from bounded import direct

from longctx.attention import simulate
from longctx.attention.comm import Counters, Link
from longctx.bounded.abc import control
from longctx.bounded.abc import operator as abc
from longctx.bounded.arguments import SequenceCall
from longctx.bounded.cosine import operator as cosine
from longctx.layout import get_layout


class Case(NamedTuple):
    """A call by name, which processes can be given. tensors: number after q, k, v; local: sharded like these."""

    name: str
    causal: bool = True
    tensors: int = 1
    local: bool = True


CASES = {
    case.name: case
    for case in (
        Case("prefix"),
        Case("prefix pair", tensors=2),
        Case("running"),
        Case("running pair", tensors=2),
        Case("random", tensors=0),
        Case("random sum", tensors=0),
        Case("linformer", local=False),
        Case("identity", tensors=0),
        Case("cluster", tensors=0),
        Case("window", tensors=0),
        Case("wide window", tensors=0),
        Case("dilated", tensors=0),
        Case("compressive", tensors=0),
        Case("cosine value", local=False),
        Case("cosine query", local=False),
        Case("bidirectional", causal=False),
        Case("bidirectional pair", causal=False, tensors=2),
        Case("bidirectional random sum", causal=False, tensors=0),
        Case("bidirectional cosine", causal=False, local=False),
    )
}
SLOTS = 4
_STRATEGIES = {
    "random": control.random(SLOTS, 3), "random sum": control.random(SLOTS, 3), "identity": control.identity(64),
    "cluster": control.cluster(SLOTS),
    "bidirectional random sum": control.random(SLOTS, 3), "window": control.window(5),
    "wide window": control.window(20), "dilated": control.dilated(3, 4), "compressive": control.compressive(6, 4),
}  # fmt: skip


def inputs(name: str, length: int = 48, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return [q, k, v, the case's tensors] and a weight for the output."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, length, 5), (2, 2, length, 5), (2, 2, length, 3)]
    case = CASES[name]
    if "cosine" in name:
        shapes.append((4,))
    elif name == "linformer":
        shapes.append((1, SLOTS, 64))
    else:
        shapes += [(2, 2, length, SLOTS)] * case.tensors
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    return leaves, torch.randn(2, 4, length, 3, generator=g, dtype=torch.float64)


def call(
    name: str,
    tensors: list[torch.Tensor],
    documents: torch.Tensor | None,
    layout: str,
    link: Link | None,
    mesh: Any = None,
    length: int | None = None,
    state: Any = None,
    return_state: bool = False,
) -> torch.Tensor:
    """Call the operator; with return_state return (out, state)."""
    q, k, v, *others = tensors
    shared = SequenceCall(
        causal=CASES[name].causal, mesh=mesh, layout=layout, document_ids=documents, length=length, state=state,
        return_state=return_state, link=link,
    )  # fmt: skip
    if "cosine" in name:
        scale_on = "query" if "query" in name else "value"
        return cosine.attend(q, k, v, others[0], shared, scale_on=scale_on)  # type: ignore[return-value]
    chosen: Any = _STRATEGIES.get(name)
    if name == "linformer":
        chosen = control.linformer(others[0])
    elif chosen is None:
        chosen = others[0] if len(others) == 1 else (others[0], others[1])
    normalizer = "running" if "running" in name else "sum" if "sum" in name else "prefix"
    return abc.attend(q, k, v, chosen, shared, normalizer=normalizer, scale=0.7)  # type: ignore[return-value]


def indices(layout: str, ring: int, length: int) -> list[torch.Tensor]:
    """Return the global indices of each rank's tokens."""
    spans = [get_layout(layout).spans(rank, ring, length) for rank in range(ring)]
    return [torch.cat([torch.arange(span.start, span.last + 1) for span in here]) for here in spans]


Answer = list[torch.Tensor | None]


def one_device(
    name: str,
    leaves: list[torch.Tensor],
    weight: torch.Tensor,
    documents: torch.Tensor | None,
    length: int | None = None,
) -> Answer:
    """Return [out, the gradient of every leaf]."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = call(name, leaves, documents, "contiguous", None, length=length)
    return [out.detach(), *direct.gradients(out, weight, leaves)]


def local_answer(
    name: str,
    leaves: list[torch.Tensor],
    weight: torch.Tensor,
    documents: torch.Tensor | None,
    here: torch.Tensor,
    run: Callable[[list[torch.Tensor], torch.Tensor | None], torch.Tensor],
) -> Answer:
    """Return one rank's [out, gradients]; `run(tensors, documents)` makes its call."""
    sharded = [index < 3 or CASES[name].local for index in range(len(leaves))]
    mine = [x[:, :, here] if split else x for x, split in zip(leaves, sharded, strict=True)]
    mine = [x.clone().requires_grad_() for x in mine]
    out = run(mine, None if documents is None else documents[:, here])
    return [out.detach(), *direct.gradients(out, weight[:, :, here], mine)]


def assemble(name: str, answers: list[Answer], order: torch.Tensor) -> Answer:
    """Return the ranks' results as one device's: tokens in order; gradients of replicated tensors summed."""
    whole: Answer = []
    for place, parts in enumerate(zip(*answers, strict=True)):
        given = [x for x in parts if x is not None]
        if place <= 3 or CASES[name].local:
            whole.append(torch.cat(given, 2)[:, :, order] if given else None)
        else:
            whole.append(sum(given) if given else None)  # type: ignore[arg-type]
    return whole


def simulated(
    ring: int,
    layout: str,
    name: str,
    leaves: list[torch.Tensor],
    weight: torch.Tensor,
    documents: torch.Tensor | None,
    length: int | None = None,
) -> tuple[Answer, list[Counters]]:
    """Run one thread per rank; return the result and each rank's counters."""
    parts = indices(layout, ring, leaves[0].shape[2])

    def worker(link: Link) -> Answer:
        def run(mine: list[torch.Tensor], ids: torch.Tensor | None) -> torch.Tensor:
            return call(name, mine, ids, layout, link, length=length)

        return local_answer(name, leaves, weight, documents, parts[link.rank], run)

    answers, counters = simulate.run(ring, worker)
    return assemble(name, answers, torch.cat(parts).argsort()), counters

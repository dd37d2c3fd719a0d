"""Attention without `causal` to packed documents: each has a memory of its own, that of all its tokens.

Documents that lie within one stretch of one rank are computed one by one. A document that crosses the border of a
stretch is the first or the last one of each stretch that it touches, so two states a stretch are all that ranks tell
each other, however many documents there are: a scan brings what the tokens before the stretch wrote of its first
document, a scan from the end what those after it wrote of its last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from longctx.bounded.chunks import Runs
from longctx.bounded.ranks import monoid
from longctx.bounded.ranks.exchange import Operation, Value
from longctx.bounded.ranks.scan import associative_exclusive_scan
from longctx.bounded.ranks.sequence import Place
from longctx.errors import AttentionError


def several(ids: torch.Tensor | None) -> bool:
    """Whether a row of ids (B, T) holds more than one document."""
    if ids is None:
        return False
    top = ids.amax(1, keepdim=True)
    return bool(((ids >= 0) & (ids != top)).any())


def memory_each(place: Place, queries: int, state: bool) -> bool:
    """Whether attention without `causal` must take the documents apart. On a ring it does so wherever there are ids
    and no state is asked for, since no rank knows all documents; one that fills all ranks is found whole as well.

    Args:
        queries: tokens that ask. state: whether a state is given or asked for.

    Raises:
        AttentionError: packed documents, on one device, with a state or in cross attention.
    """
    if place.ids is None:
        return False
    if place.link.ring > 1:
        return not state and queries == place.ids.shape[1]
    if not several(place.ids):
        return False
    if state:
        raise AttentionError("packed documents without causal have a memory each: there is no one state")
    if queries != place.ids.shape[1]:
        raise AttentionError("cross attention to packed documents: which one a query belongs to is not known")
    return True


def documents(ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(row, the indices of its tokens) of every document of ids (B, T); padding (-1) belongs to none."""
    for row, known in enumerate(ids.cpu()):
        places = (known >= 0).nonzero()[:, 0]
        lengths = torch.unique_consecutive(known[places], return_counts=True)[1]
        for tokens in places.split(lengths.tolist()):
            yield row, tokens.to(ids.device)


def _one_by_one(
    ids: torch.Tensor, alone: Callable[[int, torch.Tensor], torch.Tensor], nothing: torch.Tensor
) -> torch.Tensor:
    """The outputs of `alone(row, tokens)`, (1, H, n, Dv) for every document, in the places of their tokens.

    nothing: (1, H, 1, Dv), the output of padding.
    """
    rows: list[list[torch.Tensor]] = [[] for _ in ids]
    order: list[list[torch.Tensor]] = [[] for _ in ids]
    for row, tokens in documents(ids):
        rows[row].append(alone(row, tokens))
        order[row].append(tokens)
    outs = []
    for pieces, places in zip(rows, order, strict=True):
        found = torch.zeros(ids.shape[1], dtype=torch.int64, device=ids.device)
        if places:
            where = torch.cat(places)
            found[where] = torch.arange(1, len(where) + 1, device=ids.device)
        outs.append(torch.cat([nothing, *pieces], 2).index_select(2, found))
    return torch.cat(outs)


def each(
    place: Place,
    element: Callable[[slice, torch.Tensor, torch.Tensor], Value],
    op: Operation,
    nothing: Callable[[Value], Value],
    read: Callable[[slice, Value], torch.Tensor],
    alone: Callable[[slice, int, torch.Tensor], torch.Tensor],
    silent: torch.Tensor,
) -> torch.Tensor:
    """Every token reads the memory of its whole document, on one device or a ring; (B, H, T, Dv).

    Args:
        place: with ids.
        element: (stretch, which tokens (B, T'), their document (B,)) -> what these write, a state of `op`.
        op: the monoid of states. nothing: its identity, in the shapes of a state.
        read: (stretch, states) -> what all its tokens read.
        alone: (stretch, row, tokens of it) -> what one document's tokens read that are all here, (1, H, n, Dv).
        silent: (1, H, 1, Dv), the output of padding.
    """
    assert place.ids is not None

    def within(here: slice, ids: torch.Tensor) -> torch.Tensor:
        return _one_by_one(ids, lambda row, tokens: alone(here, row, tokens), silent)

    if place.link.ring == 1:
        return within(slice(None), place.ids)
    stretches = [Runs(place.ids[:, here], None) for here in place.parts]
    heads, tails = [], []
    for here, runs in zip(place.parts, stretches, strict=True):
        tails.append(element(here, runs.tail(), runs.ending))
        whole = bool(runs.single.all())
        heads.append(tails[-1] if whole else element(here, runs.head(), _heading(runs, place.ids[:, here])))
    before = associative_exclusive_scan(tails, op, nothing(tails[0]), place.link, place.chain)
    after = associative_exclusive_scan(
        heads, lambda first, second: op(second, first), nothing(heads[0]), place.link, place.chain, reverse=True
    )
    outs = []
    for here, runs, head, tail, left, right in zip(place.parts, stretches, heads, tails, before, after, strict=True):
        of_first, of_last = runs.head(), runs.tail()
        out = within(here, runs.ids.masked_fill(of_first | of_last, -1))
        for mask, state, (near, far) in ((of_first, head, (left, right)), (of_last, tail, (right, left))):
            # The neighbour at its own border goes on with the document; the other one only if there is no other.
            joined = op(near, (*state[:-1], monoid.name(state[-1])))
            joined = op(far, (*joined[:-1], state[-1]))
            out = torch.where(mask[:, None, :, None], read(here, joined), out)
        outs.append(out)
    return torch.cat(outs, 2)


def _heading(runs: Runs, ids: torch.Tensor) -> torch.Tensor:
    """(B,) the first document of each row as monoid.py names it; -1 where there is only padding."""
    first = ids.gather(1, (ids >= 0).int().argmax(1, keepdim=True))[:, 0].clamp_min(-1)
    return torch.where(runs.single, first, monoid.begun(first))

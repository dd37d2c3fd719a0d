"""Non-causal attention to packed documents: one state per document, on one device or a ring.

Documents that lie within one stretch (contiguous tokens of one rank) are computed one by one. A document that crosses
the border of a stretch is the first or the last one of every stretch it touches, so ranks exchange two states per
stretch however many documents there are: a forward scan delivers the state of its first document from the tokens before
the stretch, a reverse scan that of its last document from the tokens after it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from longctx.bounded.chunks import Runs
from longctx.bounded.inputs import SequenceInputs
from longctx.bounded.ranks import monoid
from longctx.bounded.ranks.scan import associative_exclusive_scan
from longctx.bounded.ranks.sequence import LocalTokens, has_several
from longctx.errors import AttentionError


def several(ids: torch.Tensor | None) -> bool:
    """Return whether a row of ids (B, T) holds more than one document."""
    return ids is not None and bool(has_several(ids).any())


def separate_documents(local: LocalTokens, queries: int, state: bool) -> bool:
    """Return whether non-causal attention must compute documents separately.

    On a ring it does so whenever there are ids and no state is involved, since no rank sees all documents; a document
    that fills all ranks comes out whole as well.

    Args:
        queries: number of query tokens. state: whether a state is given or returned.

    Raises:
        AttentionError: packed documents, on one device, with a state or in cross attention.
    """
    if local.ids is None:
        return False
    if local.link.ring > 1:
        return not state and queries == local.ids.shape[1]
    if not several(local.ids):
        return False
    if state:
        raise AttentionError(
            "packed documents without causal have one state per document: no single state can be given or returned"
        )
    if queries != local.ids.shape[1]:
        raise AttentionError("cross attention to packed documents: the document of a query is unknown")
    return True


def documents(ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (row, indices of its tokens) for every document of ids (B, T); padding (-1) belongs to none."""
    for row, known in enumerate(ids.cpu()):
        valid = (known >= 0).nonzero()[:, 0]
        lengths = torch.unique_consecutive(known[valid], return_counts=True)[1]
        for tokens in valid.split(lengths.tolist()):
            yield row, tokens.to(ids.device)


def attend_documents(x: SequenceInputs, local: LocalTokens) -> torch.Tensor:
    """Let every token read the state of its whole document: (B, H, T, Dv), 0 at padding. `local` has ids."""
    assert local.ids is not None
    if local.link.ring == 1:
        return _one_by_one(x, local.ids)
    runs = [Runs(local.ids[:, here], None) for here in local.parts]
    clean = x.clear_queries(local.valid)
    # The states of each stretch's first and last document, which are the same one if the stretch holds no other.
    heads, tails = [], []
    for here, run in zip(local.parts, runs, strict=True):
        part = x.part(here)
        tails.append(part.write(run.tail(), run.ending))
        single = bool(run.single.all())
        heads.append(tails[-1] if single else part.write(run.head(), _first_document(run, local.ids[:, here])))
    nothing = monoid.identity(tails[0])
    before = associative_exclusive_scan(tails, x.combine, nothing, local.link, local.stretches)
    after = associative_exclusive_scan(
        heads, lambda first, second: x.combine(second, first), nothing, local.link, local.stretches, reverse=True
    )
    outs = []
    for here, run, head, tail, left, right in zip(local.parts, runs, heads, tails, before, after, strict=True):
        first, last = run.head(), run.tail()
        # Documents that lie within the stretch have no neighbours on other ranks.
        out = _one_by_one(x.part(here), run.ids.masked_fill(first | last, -1))
        for mask, state, (near, far) in ((first, head, (left, right)), (last, tail, (right, left))):
            # joined: what the document's other tokens wrote, on its open side (near: before the stretch for its first
            # document, after it for its last), plus this stretch. `name` drops the mark "began in this stretch" first,
            # because the document may continue beyond that border: combine() then only compares ids.
            joined = x.combine(near, (*state[:-1], monoid.name(state[-1])))
            # The other side (far) is added only if the document fills the stretch. If it does not, the document began
            # here as seen from that side, and the mark makes combine() drop what stands there.
            joined = x.combine(far, (*joined[:-1], state[-1]))
            out = torch.where(mask[:, None, :, None], clean.part(here).read(joined), out)
        outs.append(out)
    return torch.cat(outs, 2)


def _one_by_one(x: SequenceInputs, ids: torch.Tensor) -> torch.Tensor:
    """Compute each document of ids (B, T) by itself: (B, H, T, Dv), 0 at padding."""
    rows: list[list[torch.Tensor]] = [[] for _ in ids]
    order: list[list[torch.Tensor]] = [[] for _ in ids]
    for row, tokens in documents(ids):
        rows[row].append(x.document(row, tokens).attend_all())
        order[row].append(tokens)
    padding = x.q.new_zeros((1, x.q.shape[1], 1, x.v.shape[3]))
    outs = []
    for pieces, positions in zip(rows, order, strict=True):
        # One gather per row: column 0 is the output of padding, the documents' outputs follow.
        found = torch.zeros(ids.shape[1], dtype=torch.int64, device=ids.device)
        if positions:
            where = torch.cat(positions)
            found[where] = torch.arange(1, len(where) + 1, device=ids.device)
        outs.append(torch.cat([padding, *pieces], 2).index_select(2, found))
    return torch.cat(outs)


def _first_document(runs: Runs, ids: torch.Tensor) -> torch.Tensor:
    """Return the first document (B,) of each row of ids (B, T) int64 in the notation of monoid.py; -1 where there is
    only padding."""
    first = ids.gather(1, (ids >= 0).int().argmax(1, keepdim=True))[:, 0].clamp_min(-1)
    return torch.where(runs.single, first, monoid.begun(first))

"""ABC whose slots are a queue of tokens: window, dilated, compressive. Exact attention to a bounded range of tokens.

A queue is not a sum, so no scan can combine it. What a token reads lies within `reach` tokens before it. The state
holds those tokens, and a rank receives them from the ranks before it (the halo); their number does not depend on the
length.

Padding takes no slot of a queue. Where padding follows a token, tokens are compacted (padding first) before
the queue is read, and the halo extends back until it holds `reach` tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import torch
from torch.nn import functional

from longctx.attention.block import block_attention
from longctx.bounded.abc.control import Fifo
from longctx.bounded.arguments import SequenceCall, check_state
from longctx.bounded.chunks import Runs
from longctx.bounded.ranks.exchange import Value, collect
from longctx.bounded.ranks.sequence import LocalTokens
from longctx.bounded.state import FifoState
from longctx.errors import AttentionError

_QUERIES = 128


class QueueTokens(NamedTuple):
    """keys (B, G, T, D), values (B, G, T, Dv), their documents (B, T) and indices within the document (B, T), int64."""

    keys: torch.Tensor
    values: torch.Tensor
    document: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which is not used here

    def cut(self, part: slice) -> QueueTokens:
        """Return a slice of the tokens."""
        return QueueTokens(*(x[:, :, part] if x.dim() == 4 else x[:, part] for x in self))

    def last(self, count: int) -> QueueTokens:
        return self.cut(slice(-count, None))

    def numbered(self) -> QueueTokens:
        """Number the documents in order, so that an id that returns is another document."""
        return self._replace(document=Runs(self.document, None).ids)

    def then(self, later: QueueTokens) -> QueueTokens:
        """Append later tokens."""
        return QueueTokens(*(torch.cat(pair, 2 if pair[0].dim() == 4 else 1) for pair in zip(self, later, strict=True)))

    def reordered(self, order: torch.Tensor) -> QueueTokens:
        """Return the tokens in `order` (B, N)."""
        return QueueTokens(*(_reordered(x, order) for x in self))


def reach(control: Fifo) -> int:
    """Return how many tokens before itself a token may read (at least 1, so that a state knows its position)."""
    if not control.strided:
        return max(control.recent - 1, 1)
    older = control.strided * control.stride
    return older if not control.pooled else older + control.stride + control.recent - 2


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, control: Fifo, call: SequenceCall, scale: float
) -> tuple[torch.Tensor, FifoState | None]:
    """Return (out, the state if `call.return_state`); arguments as of `abc_attention`."""
    if not call.causal:
        raise AttentionError("a queue of tokens follows their order: window, dilated and compressive need causal=True")
    local = call.locate(k)
    check_state(call.state, local, FifoState, q.shape[0])
    before = None
    if call.state is not None:
        before = QueueTokens(*(getattr(call.state, name) for name in QueueTokens._fields))
    ids = local.ids
    if ids is None:
        ids = torch.zeros(k.shape[0], k.shape[2], dtype=torch.int64, device=k.device)
        if before is not None:  # without ids all tokens continue the state's document
            ids = ids + before.document[:, -1:].clamp_min(0)
    counted = local.counts(None, None)[0] if before is None else _counts_after(local, ids, before)
    if local.valid is not None:
        hidden = ~local.valid[:, None, :, None]
        q, k, v = (x.masked_fill(hidden, 0.0) for x in (q, k, v))
    own = QueueTokens(k, v, ids, (counted - 1).expand(k.shape[0], -1))
    halos, last = [before], own
    if local.link.ring > 1:
        halos, last = _halos(own, before, local, reach(control), call.return_state)
    outs = [
        _stretch(q[:, :, part], own.cut(part), halo, control, scale)
        for part, halo in zip(local.parts, halos, strict=True)
    ]
    after = FifoState(*_last(last, before, reach(control))) if call.return_state else None
    return torch.cat(outs, 2), after


def _counts_after(local: LocalTokens, ids: torch.Tensor, before: QueueTokens) -> torch.Tensor:
    """Count each token's document up to and including it, the state's tokens too: (B, T) int64."""
    whole = replace(local, ids=ids)
    return whole.counts(before.index[:, -1] + 1, before.document[:, -1])[0]


def _last(own: QueueTokens, before: QueueTokens | None, count: int) -> QueueTokens:
    """Return the last `count` valid tokens; where there are fewer, absent ones of document -1 come first."""
    whole = own if before is None else before.then(own)
    missing = max(count - whole.keys.shape[2], 0)
    if missing:
        whole = _absent(own, missing).then(whole)
    return whole.reordered(_order(whole.document)[:, -count:])


def _order(document: torch.Tensor) -> torch.Tensor:
    """Return the order (B, T) that puts padding first and then the tokens, both in their own order."""
    return (document >= 0).long().argsort(dim=1, stable=True)


def _reordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return x (B, G, T, D) or (B, T) with tokens in `order` (B, N)."""
    if x.dim() == 2:
        return x.gather(1, order)
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _absent(like: QueueTokens, count: int) -> QueueTokens:
    keys, values = (x.new_zeros((*x.shape[:2], count, x.shape[3])) for x in (like.keys, like.values))
    absent = like.document.new_full((like.document.shape[0], count), -1)
    return QueueTokens(keys, values, absent, absent)


def _halos(
    own: QueueTokens, before: QueueTokens | None, local: LocalTokens, count: int, total: bool
) -> tuple[list[QueueTokens | None], QueueTokens]:
    """Fetch the `count` tokens before each stretch of this rank.

    Args:
        before: the tokens before the sequence.
        total: also fetch the last valid tokens of every stretch, since padding may fill any number of the last ones.

    Returns:
        The halos; and the last valid tokens of all stretches in order if `total`, else `own`.
    """
    sent = min(count, local.parts[0].stop - local.parts[0].start)
    tails: list[Value] = [
        here.last(sent) if local.ids is None else _last(here, None, sent) for here in map(own.cut, local.parts)
    ]
    filled = _filled(local)

    def needed(source: int, stretch: int) -> bool:
        """Whether in some row the stretches between source and stretch hold fewer than `count` tokens."""
        return source < stretch and bool((filled[source + 1 : stretch].sum(0) < count).any())

    known, token = collect(
        tails,
        local.link,
        local.stretches,
        lambda source, here: total or any(needed(source, stretch) for stretch in here),
    )
    halos: list[QueueTokens | None] = []
    for stretch in local.stretches.by_rank[local.link.rank]:
        halo = _absent(own, count) if before is None else before
        # The token ties the first stretch, which receives nothing, to the exchange, whose backward needs every rank.
        halo = halo._replace(keys=halo.keys + token.to(halo.keys.dtype))
        for source in range(stretch):
            if needed(source, stretch):
                halo = halo.then(QueueTokens(*known[source]))
        halos.append(halo.last(count) if local.ids is None else _last(halo, None, count))
    if not total:
        return halos, own
    return halos, reduce(QueueTokens.then, (QueueTokens(*known[stretch]) for stretch in range(local.stretches.total)))


def _filled(local: LocalTokens) -> torch.Tensor:
    """Return the number of valid tokens of every stretch of the sequence, (stretches, B or 1), on the host."""
    sizes = [part.stop - part.start for part in local.parts]
    if local.valid is None:
        return torch.full((local.stretches.total, 1), sizes[0])
    own: list[Value] = [(local.valid[:, part].sum(1),) for part in local.parts]
    known, _ = collect(own, local.link, local.stretches, lambda source, here: True)
    return torch.stack([known[stretch][0] for stretch in range(local.stretches.total)]).cpu()


def _stretch(q: torch.Tensor, own: QueueTokens, halo: QueueTokens | None, control: Fifo, scale: float) -> torch.Tensor:
    """Compute the outputs of one stretch, whose tokens follow those of the halo."""
    seen = own if halo is None else halo.then(own)
    absent = seen.document < 0
    if not bool((absent[:, 1:] & ~absent[:, :-1]).any()):  # no padding after a token
        seen = seen.numbered()
        return _queue(q, seen.last(q.shape[2]), seen, control, scale)
    # Compact the keys, padding first. Queries are compacted within the stretch; their outputs go back to the original
    # order.
    seen = seen.reordered(_order(seen.document)).numbered()
    order, queries = _order(own.document), seen.last(q.shape[2])
    missing = _reordered(own.document, order) < 0  # at this stretch's padding `seen` has tokens of the halo
    queries = queries._replace(document=queries.document.masked_fill(missing, -1))
    out = _queue(_reordered(q, order), queries, seen, control, scale)
    return _reordered(out, order.argsort(1))


def _queue(q: torch.Tensor, queries: QueueTokens, seen: QueueTokens, control: Fifo, scale: float) -> torch.Tensor:
    """Attend with q (B, H, T, D) of the tokens `queries`, the last T of `seen`.

    Documents are numbered and padding comes first.
    """
    if not control.strided:
        return block_attention(
            q, seen.keys, seen.values, window=control.recent, scale=scale,
            document_ids=queries.document, key_document_ids=seen.document,
        )[0]  # fmt: skip
    outs = []
    offset, far = seen.keys.shape[2] - q.shape[2], reach(control)
    step = max(_QUERIES, far // 2)
    for start in range(0, q.shape[2], step):
        rows = slice(start, min(start + step, q.shape[2]))
        first = max(rows.start + offset - far, 0)
        in_reach = seen.cut(slice(first, rows.stop + offset))
        outs.append(_strided(q[:, :, rows], queries.cut(rows), in_reach, control, scale))
    return torch.cat(outs, 2)


def _strided(q: torch.Tensor, queries: QueueTokens, seen: QueueTokens, control: Fifo, scale: float) -> torch.Tensor:
    """Attend to the recent tokens and to the entries of the strides in one softmax."""
    age = queries.index[:, :, None] - seen.index[:, None]
    same = (queries.document[:, :, None] == seen.document[:, None]) & (queries.document >= 0)[:, :, None] & (age >= 0)
    ends = ((seen.index + 1) % control.stride == 0)[:, None]
    if control.pooled:
        youngest, oldest = control.recent, control.recent + control.strided * control.stride - 1
    else:
        youngest, oldest = 1, control.strided * control.stride
    # An entry is the last token of a stride, or with `pooled` the mean that ends there.
    entries = same & ends & (age >= youngest) & (age <= oldest)
    keys, values = seen.keys, seen.values
    if control.pooled:
        keys, values = (torch.cat([x, _means(x, control.stride)], 2) for x in (keys, values))
        mask = torch.cat([same & (age < control.recent), entries], 2)
    else:
        mask = (same & (age < control.recent)) | entries
    none = ~mask.any(-1, keepdim=True)  # padding reads all, so no softmax is NaN, and is zeroed then
    rows = (mask | none)[:, None].expand(-1, q.shape[1] // keys.shape[1], -1, -1).flatten(1, 2)[:, None]
    grouped = q.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=rows, scale=scale)
    return out.unflatten(2, (-1, q.shape[2])).flatten(1, 2).masked_fill(none[:, None], 0.0)


def _means(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Average each token of x (B, G, T, D) with the stride - 1 before it; the first ones, with fewer, are not used."""
    padded = functional.pad(x, (0, 0, stride - 1, 0))
    return padded.unfold(2, stride, 1).mean(-1)

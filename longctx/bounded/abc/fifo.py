"""ABC whose slots are a queue of tokens: window, dilated, compressive. Exact attention to a bounded range of tokens.

Such a memory is no sum, so no scan joins it: what a token sees lies within `reach` tokens before it, and those are what
the state holds and what a rank gets from the ranks before it, the halo. Their number does not depend on the length.

Padding takes no place in a queue. Where it stands behind a token, tokens are moved together (padding first) before the
queue is read, and the halo reaches back until it holds `reach` tokens.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch.nn import functional

from longctx.attention.arguments import resolve_scale
from longctx.attention.block import block_attention
from longctx.attention.comm import Link
from longctx.bounded.abc.control import Fifo
from longctx.bounded.arguments import check_state
from longctx.bounded.chunks import Runs
from longctx.bounded.ranks.exchange import Value, collect
from longctx.bounded.ranks.sequence import Place, locate
from longctx.bounded.state import FifoState, State
from longctx.errors import AttentionError
from longctx.layout import Layout
from longctx.mesh import Mesh

_QUERIES = 128


class Tokens(NamedTuple):
    """keys (B, G, T, D), values (B, G, T, Dv), their documents (B, T) and their places therein (B, T), int64."""

    keys: torch.Tensor
    values: torch.Tensor
    document: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks of tokens

    def last(self, count: int) -> Tokens:
        return Tokens(*(x[:, :, -count:] if x.dim() == 4 else x[:, -count:] for x in self))

    def numbered(self) -> Tokens:
        """The same tokens with documents numbered in their order: an id that comes back is another document."""
        return self._replace(document=Runs(self.document, None).ids)

    def then(self, later: Tokens) -> Tokens:
        return Tokens(*(torch.cat(pair, 2 if pair[0].dim() == 4 else 1) for pair in zip(self, later, strict=True)))


def reach(control: Fifo) -> int:
    """Tokens before itself that a token may see (at least 1, so that a state knows where it is)."""
    if not control.strided:
        return max(control.recent - 1, 1)
    older = control.strided * control.stride
    return older if not control.pooled else older + control.stride + control.recent - 2


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    control: Fifo,
    causal: bool,
    scale: float | None,
    mesh: Mesh | None,
    layout: str | Layout,
    document_ids: torch.Tensor | None,
    length: int | None,
    state: State | None,
    return_state: bool,
    link: Link | None,
) -> tuple[torch.Tensor, FifoState | None]:
    """(out, the state if asked for); arguments as of `abc_attention`."""
    if not causal:
        raise AttentionError("a queue of tokens follows their order: window, dilated and compressive need causal=True")
    place = locate(
        k.shape[2], k.shape[0], k.device,
        mesh=mesh, layout=layout, document_ids=document_ids, length=length, link=link,
    )  # fmt: skip
    check_state(state, place, FifoState, q.shape[0])
    before = None if state is None else Tokens(*(getattr(state, name) for name in Tokens._fields))
    ids = place.ids
    if ids is None:
        ids = torch.zeros(k.shape[0], k.shape[2], dtype=torch.int64, device=k.device)
        if before is not None:  # no ids: all tokens go on with the state's document
            ids = ids + before.document[:, -1:].clamp_min(0)
    counted = place.counts(None, None)[0] if before is None else _counted(place, ids, before)
    local = Tokens(k, v, ids, (counted - 1).expand(k.shape[0], -1))
    if place.valid is not None:
        hidden = ~place.valid[:, None, :, None]
        q, k, v = (x.masked_fill(hidden, 0.0) for x in (q, k, v))
        local = local._replace(keys=k, values=v)
    halos, last = [before], local
    if place.link.ring > 1:
        halos, last = _around(local, before, place, reach(control), return_state)
    outs = [
        _stretch(q[:, :, part], Tokens(*(_cut(x, part) for x in local)), halo, control, resolve_scale(scale, q))
        for part, halo in zip(place.parts, halos, strict=True)
    ]
    after = FifoState(*_last(last, before, reach(control))) if return_state else None
    return torch.cat(outs, 2), after


def _cut(x: torch.Tensor, part: slice) -> torch.Tensor:
    return x[:, :, part] if x.dim() == 4 else x[:, part]


def _counted(place: Place, ids: torch.Tensor, before: Tokens) -> torch.Tensor:
    whole = Place(place.link, place.chain, place.parts, place.index, ids)
    return whole.counts(before.index[:, -1] + 1, before.document[:, -1])[0]


def _last(local: Tokens, before: Tokens | None, count: int) -> Tokens:
    """The last `count` valid tokens; what was never seen has document -1."""
    whole = local if before is None else before.then(local)
    missing = max(count - whole.keys.shape[2], 0)
    if missing:
        whole = _nothing(local, missing).then(whole)
    order = _order(whole.document)[:, -count:]
    return Tokens(*(_reordered(x, order) for x in whole))


def _order(document: torch.Tensor) -> torch.Tensor:
    """(B, T): padding first, then the tokens, both in their order."""
    return (document >= 0).long().argsort(dim=1, stable=True)


def _reordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x (B, G, T, D) or (B, T) with tokens in `order` (B, N)."""
    if x.dim() == 2:
        return x.gather(1, order)
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _nothing(like: Tokens, count: int) -> Tokens:
    keys, values = (x.new_zeros((*x.shape[:2], count, x.shape[3])) for x in (like.keys, like.values))
    absent = like.document.new_full((like.document.shape[0], count), -1)
    return Tokens(keys, values, absent, absent)


def _around(
    local: Tokens, before: Tokens | None, place: Place, count: int, total: bool
) -> tuple[list[Tokens | None], Tokens]:
    """(the `count` tokens before each stretch of this rank, `before` those before the sequence; if `total` the last
    valid tokens of all stretches in order, from every rank, since padding may fill any number of the last ones)."""
    sent = min(count, place.parts[0].stop - place.parts[0].start)
    stretches = [Tokens(*(_cut(x, part) for x in local)) for part in place.parts]
    tails: list[Value] = [here.last(sent) if place.ids is None else _last(here, None, sent) for here in stretches]
    filled = _filled(place)

    def needed(source: int, chunk: int) -> bool:
        """Whether the stretches between them leave some row of the chunk's halo short of tokens."""
        return source < chunk and bool((filled[source + 1 : chunk].sum(0) < count).any())

    known, token = collect(
        tails, place.link, place.chain, lambda source, here: total or any(needed(source, chunk) for chunk in here)
    )
    halos: list[Tokens | None] = []
    for chunk in place.chain.chunks[place.link.rank]:
        halo = _nothing(local, count) if before is None else before
        halo = halo._replace(keys=halo.keys + token.to(halo.keys.dtype))  # ties the first stretch to the exchange
        for source in range(chunk):
            if needed(source, chunk):
                halo = halo.then(Tokens(*known[source]))
        halos.append(halo.last(count) if place.ids is None else _last(halo, None, count))
    if not total:
        return halos, local
    return halos, reduce(Tokens.then, (Tokens(*known[chunk]) for chunk in range(place.chain.total)))


def _filled(place: Place) -> torch.Tensor:
    """(chunks, B or 1) on the host: the tokens of every stretch of the sequence, without padding."""
    sizes = [part.stop - part.start for part in place.parts]
    if place.valid is None:
        return torch.full((place.chain.total, 1), sizes[0])
    own: list[Value] = [(place.valid[:, part].sum(1),) for part in place.parts]
    known, _ = collect(own, place.link, place.chain, lambda source, here: True)
    return torch.stack([known[chunk][0] for chunk in range(place.chain.total)]).cpu()


def _stretch(q: torch.Tensor, local: Tokens, halo: Tokens | None, control: Fifo, scale: float) -> torch.Tensor:
    """The outputs of one stretch, whose tokens follow those of the halo."""
    seen = local if halo is None else halo.then(local)
    absent = seen.document < 0
    if not bool((absent[:, 1:] & ~absent[:, :-1]).any()):  # no padding behind a token
        seen = seen.numbered()
        return _queue(q, seen.last(q.shape[2]), seen, control, scale)
    seen = Tokens(*(_reordered(x, _order(seen.document)) for x in seen)).numbered()
    order, asking = _order(local.document), seen.last(q.shape[2])
    missing = _reordered(local.document, order) < 0  # where this stretch's padding is, `seen` has the halo's tokens
    asking = asking._replace(document=asking.document.masked_fill(missing, -1))
    out = _queue(_reordered(q, order), asking, seen, control, scale)
    return _reordered(out, order.argsort(1))


def _queue(q: torch.Tensor, local: Tokens, seen: Tokens, control: Fifo, scale: float) -> torch.Tensor:
    """Queries (B, H, T, D) of `local`, the last T tokens of `seen`; documents are numbered and padding is first."""
    if not control.strided:
        return block_attention(
            q, seen.keys, seen.values, window=control.recent, scale=scale,
            document_ids=local.document, key_document_ids=seen.document,
        )[0]  # fmt: skip
    outs = []
    offset, far = seen.keys.shape[2] - q.shape[2], reach(control)
    step = max(_QUERIES, far // 2)
    for start in range(0, q.shape[2], step):
        rows = slice(start, min(start + step, q.shape[2]))
        first = max(rows.start + offset - far, 0)
        window = Tokens(*(_cut(x, slice(first, rows.stop + offset)) for x in seen))
        asking = Tokens(*(_cut(x, rows) for x in local))
        outs.append(_strided(q[:, :, rows], asking, window, control, scale))
    return torch.cat(outs, 2)


def _strided(q: torch.Tensor, asking: Tokens, seen: Tokens, control: Fifo, scale: float) -> torch.Tensor:
    """Queries over the recent tokens and over the entries of the strides, in one softmax."""
    age = asking.index[:, :, None] - seen.index[:, None]
    same = (asking.document[:, :, None] == seen.document[:, None]) & (asking.document >= 0)[:, :, None] & (age >= 0)
    ends = ((seen.index + 1) % control.stride == 0)[:, None]
    if control.pooled:
        youngest, oldest = control.recent, control.recent + control.strided * control.stride - 1
    else:
        youngest, oldest = 1, control.strided * control.stride
    entries = same & ends & (age >= youngest) & (age <= oldest)
    keys, values = seen.keys, seen.values
    if control.pooled:
        keys, values = (torch.cat([x, _means(x, control.stride)], 2) for x in (keys, values))
        mask = torch.cat([same & (age < control.recent), entries], 2)
    else:
        mask = (same & (age < control.recent)) | entries
    none = ~mask.any(-1, keepdim=True)
    rows = (mask | none)[:, None].expand(-1, q.shape[1] // keys.shape[1], -1, -1).flatten(1, 2)[:, None]
    grouped = q.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=rows, scale=scale)
    return out.unflatten(2, (-1, q.shape[2])).flatten(1, 2).masked_fill(none[:, None], 0.0)


def _means(x: torch.Tensor, stride: int) -> torch.Tensor:
    """The mean of each token of x (B, G, T, D) with the stride - 1 before it; the first, with fewer, are not used."""
    padded = functional.pad(x, (0, 0, stride - 1, 0))
    return padded.unfold(2, stride, 1).mean(-1)

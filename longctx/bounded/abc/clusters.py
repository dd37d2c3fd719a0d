"""Which cluster of keys a token belongs to, for ABC's `cluster` control: k-means, or online for causal attention.

Online, the first M tokens of a document found the slots; later ones join the nearest centroid as it stood at the last
of every 64 tokens. What it goes on from is, a slot, the sum and number of the keys at that look, and of those since.

On a ring that is a pipeline: a rank can choose only when all before it have, so the choice takes as long as on one
device, while what is attended with it is shared out as ever. Sums are in fp64, lest a choice depend on the split.
"""

from __future__ import annotations

import torch

from longctx.bounded.ranks.exchange import Trade, Value, collect, one_each
from longctx.bounded.ranks.packed import documents
from longctx.bounded.ranks.sequence import Place

PERIOD = 64
"""Tokens between two looks at the centroids, when tokens come one after the other."""


def assign(k: torch.Tensor, ids: torch.Tensor, slots: int, iterations: int) -> torch.Tensor:
    """The slot of each key of k (B, G, T, D) by k-means among all keys of its document: (B, G, T) int64."""
    found = torch.zeros(k.shape[:3], dtype=torch.int64, device=k.device)
    for row, tokens in documents(ids):
        found[row][:, tokens] = _means(k[row][:, tokens].float(), slots, iterations)
    return found


def empty(k: torch.Tensor, slots: int) -> torch.Tensor:
    """What `follow` goes on from where nothing was seen: (B, G, M, 2 (D + 1)) fp64."""
    return k.new_zeros((*k.shape[:2], slots, 2 * (k.shape[3] + 1)), dtype=torch.float64)


def follow(
    k: torch.Tensor, index: torch.Tensor, ids: torch.Tensor, seen: torch.Tensor, document: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Go on with keys k (B, G, T, D), whose places in their documents `ids` (B, T) are `index` (B or 1, T).

    Args:
        seen: (B, G, M, 2 (D + 1)) fp64, of the tokens before, which were of `document` (B,).

    Returns:
        (the slot of each (B, G, T) int64, `seen` and `document` after the last).
    """
    found = torch.zeros(k.shape[:3], dtype=torch.int64, device=k.device)
    seen, document = seen.clone(), document.clone()
    starts = index.expand(k.shape[0], -1).cpu()
    for row, tokens in documents(ids):
        name = ids[row, tokens[0]]
        if name != document[row]:
            seen[row], document[row] = 0.0, name
        first = int(starts[row, int(tokens[0])])
        found[row][:, tokens] = _online(k[row][:, tokens].float(), first, seen[row])
    return found, seen, document


def over_ranks(
    k: torch.Tensor, index: torch.Tensor, place: Place, seen: torch.Tensor, document: torch.Tensor, total: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `follow`, for tokens on any number of ranks: (the slots, what was seen after the last token of the sequence;
    on a ring only if `total`). One message a border of stretches on different ranks."""
    ids = place.ids
    if ids is None:  # all tokens go on with the document before
        document = torch.zeros_like(document)
        ids = document[:, None].expand(-1, k.shape[2])
    chain, link = place.chain, place.link
    owner = {chunk: rank for rank, here in enumerate(chain.chunks) for chunk in here}
    found = torch.zeros(k.shape[:3], dtype=torch.int64, device=k.device)
    state: Value = (seen, document)
    leaving = []
    for chunk, part in sorted(zip(chain.chunks[link.rank], place.parts, strict=True), key=lambda pair: pair[0]):
        before, behind = owner.get(chunk - 1, link.rank), owner.get(chunk + 1, link.rank)
        if before != link.rank:
            state = tuple(Trade(link, {}, {before: list(state)}).wait()[before])
        found[:, :, part], *after = follow(k[:, :, part], index[:, part], ids[:, part], *state)
        state = tuple(after)
        if behind != link.rank:
            leaving.append(Trade(link, {behind: list(state)}, {}))
    for trade in leaving:
        trade.wait()
    if total and link.ring > 1:
        last = owner[chain.total - 1]
        state = collect([state], link, one_each(link.ring), lambda source, here: source == last)[0][last]
    return found, state[0]


def _nearest(keys: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """(G, T) of keys (G, T, D) among (G, M, D)."""
    return torch.cdist(keys, centroids).argmin(-1)


def _centroids(keys: torch.Tensor, slot: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the keys of each slot (G, M, D), their number (G, M, 1))."""
    belongs = (slot[:, None] == torch.arange(slots, device=keys.device)[:, None]).to(keys.dtype)
    return belongs @ keys, belongs.sum(-1, keepdim=True)


def _means(keys: torch.Tensor, slots: int, iterations: int) -> torch.Tensor:
    length = keys.shape[1]
    first = torch.linspace(0, length - 1, min(slots, length), device=keys.device).long()
    centroids = keys[:, first]
    slot = _nearest(keys, centroids)
    for _ in range(iterations):
        total, number = _centroids(keys, slot, centroids.shape[1])
        centroids = torch.where(number > 0, total / number.clamp_min(1), centroids)
        slot = _nearest(keys, centroids)
    return slot


def _online(keys: torch.Tensor, index: int, seen: torch.Tensor) -> torch.Tensor:
    """The slots (G, T) of the tokens from place `index` of a document on; `seen` (G, M, 2 (D + 1)) goes on in place."""
    slots = seen.shape[1]
    looked, since = seen.chunk(2, -1)
    slot = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    start = 0
    while start < keys.shape[1]:
        place = index + start
        if place < slots:
            here = slice(start, start + slots - place)
            count = min(slots - place, keys.shape[1] - start)
            slot[:, here] = torch.arange(place, place + count, device=keys.device)
        else:
            phase = (place - slots) % PERIOD
            if phase == 0:
                looked += since
                since.zero_()
            here = slice(start, start + PERIOD - phase)
            slot[:, here] = _nearest(keys[:, here], (looked[..., :-1] / looked[..., -1:]).float())
        since += torch.cat(_centroids(keys[:, here].double(), slot[:, here], slots), -1)
        start = here.stop
    return slot

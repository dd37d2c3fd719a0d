"""Assign tokens to clusters of keys, for ABC's `cluster` control: k-means, or online for causal attention.

Online, the first M tokens of a document start one slot each; later tokens join the nearest centroid, and centroids are
updated every 64 tokens. The state is, per slot, the sum and number of the keys at the last update, and of those since.

On a ring this is a pipeline: a rank can assign its tokens only after all ranks before it, so assignment takes as long
as on one device, while attention itself is sharded. Sums are in fp64 so that assignments do not depend on the split.
"""

from __future__ import annotations

import torch

from longctx.bounded.ranks.exchange import Exchange, Value, collect, one_per_rank
from longctx.bounded.ranks.packed import documents
from longctx.bounded.ranks.sequence import LocalTokens

PERIOD = 64
"""Tokens between two updates of the centroids in the online form."""


def assign(k: torch.Tensor, ids: torch.Tensor, slots: int, iterations: int) -> torch.Tensor:
    """Assign each key of k (B, G, T, D) to a slot by k-means over all keys of its document: (B, G, T) int64."""
    found = torch.zeros(k.shape[:3], dtype=torch.int64, device=k.device)
    for row, tokens in documents(ids):
        found[row][:, tokens] = _means(k[row][:, tokens].float(), slots, iterations)
    return found


def empty(k: torch.Tensor, slots: int) -> torch.Tensor:
    """Return the state of `follow` before any token: (B, G, M, 2 (D + 1)) fp64."""
    return k.new_zeros((*k.shape[:2], slots, 2 * (k.shape[3] + 1)), dtype=torch.float64)


def follow(
    k: torch.Tensor, index: torch.Tensor, ids: torch.Tensor, seen: torch.Tensor, document: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Assign keys k (B, G, T, D) online, continuing from a state.

    Args:
        index: (B or 1, T), positions of the tokens within their documents. ids: (B, T), the documents.
        seen: (B, G, M, 2 (D + 1)) fp64, the state of the tokens before, which belong to `document` (B,).

    Returns:
        The slot of each token (B, G, T) int64; `seen` and `document` after the last token.
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
    k: torch.Tensor, index: torch.Tensor, local: LocalTokens, seen: torch.Tensor, document: torch.Tensor, total: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `follow` for tokens on any number of ranks: one message per border between stretches on different ranks.

    Returns:
        The slots; and `seen` after the last token of the sequence, on a ring only if `total`.
    """
    ids = local.ids
    if ids is None:  # all tokens continue the document before
        document = torch.zeros_like(document)
        ids = document[:, None].expand(-1, k.shape[2])
    stretches, link = local.stretches, local.link
    owner = {stretch: rank for rank, here in enumerate(stretches.by_rank) for stretch in here}
    found = torch.zeros(k.shape[:3], dtype=torch.int64, device=k.device)
    state: Value = (seen, document)
    leaving = []
    for stretch, part in sorted(zip(stretches.by_rank[link.rank], local.parts, strict=True), key=lambda pair: pair[0]):
        before, behind = owner.get(stretch - 1, link.rank), owner.get(stretch + 1, link.rank)
        if before != link.rank:
            state = tuple(Exchange(link, {}, {before: list(state)}).wait()[before])
        found[:, :, part], *after = follow(k[:, :, part], index[:, part], ids[:, part], *state)
        state = tuple(after)
        if behind != link.rank:
            leaving.append(Exchange(link, {behind: list(state)}, {}))
    for exchange in leaving:
        exchange.wait()
    if total and link.ring > 1:
        last = owner[stretches.total - 1]
        state = collect([state], link, one_per_rank(link.ring), lambda source, here: source == last)[0][last]
    return found, state[0]


def _nearest(keys: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the nearest of centroids (G, M, D) for keys (G, T, D): (G, T)."""
    return torch.cdist(keys, centroids).argmin(-1)


def _centroids(keys: torch.Tensor, slot: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the keys of each slot (G, M, D), and their number (G, M, 1)."""
    belongs = (slot[:, None] == torch.arange(slots, device=keys.device)[:, None]).to(keys.dtype)
    return belongs @ keys, belongs.sum(-1, keepdim=True)


def _means(keys: torch.Tensor, slots: int, iterations: int) -> torch.Tensor:
    """Run k-means from evenly spaced keys of (G, T, D); an empty cluster keeps its centroid."""
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
    """Assign the tokens from position `index` of one document on: (G, T); updates `seen` (G, M, 2 (D + 1)) in place."""
    slots = seen.shape[1]
    updated, since = seen.chunk(2, -1)  # sums of keys and their number, at the last update of centroids and since
    slot = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    start = 0
    while start < keys.shape[1]:
        position = index + start
        if position < slots:  # the first M tokens start one slot each
            here = slice(start, start + slots - position)
            count = min(slots - position, keys.shape[1] - start)
            slot[:, here] = torch.arange(position, position + count, device=keys.device)
        else:
            phase = (position - slots) % PERIOD
            if phase == 0:
                updated += since
                since.zero_()
            here = slice(start, start + PERIOD - phase)
            slot[:, here] = _nearest(keys[:, here], (updated[..., :-1] / updated[..., -1:]).float())
        since += torch.cat(_centroids(keys[:, here].double(), slot[:, here], slots), -1)
        start = here.stop
    return slot

"""Which cluster of keys a token belongs to, for ABC's `cluster` control: k-means, or online for causal attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

PERIOD = 64
"""Tokens between two looks at the centroids, when tokens come one after the other."""


def documents(ids: torch.Tensor) -> Iterator[tuple[int, int, slice]]:
    """(row, id, tokens) of every document of ids (B, T); padding (-1) belongs to none."""
    for row, known in enumerate(ids.cpu()):
        values, lengths = torch.unique_consecutive(known, return_counts=True)
        start = 0
        for value, length in zip(values.tolist(), lengths.tolist(), strict=True):
            if value >= 0:
                yield row, value, slice(start, start + length)
            start += length


def assign(
    k: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, slots: int, iterations: int | None
) -> torch.Tensor:
    """The slot of each key of k (B, G, T, D): (B, G, T) int64. `iterations` of k-means; None: online, causal."""
    found = torch.zeros(k.shape[:3], dtype=torch.int64, device=k.device)
    index = index.expand(k.shape[0], -1)
    begins = (index == 0).cumsum(1) - 1  # every document begins at its index 0
    ids = begins.clamp_min(0) if valid is None else begins.masked_fill(~valid, -1)
    for row, _, here in documents(ids):
        keys = k[row, :, here].float()
        choose = _online(keys, slots) if iterations is None else _means(keys, slots, iterations)
        found[row, :, here] = choose
    return found


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


def _online(keys: torch.Tensor, slots: int) -> torch.Tensor:
    length = keys.shape[1]
    slot = torch.arange(length, device=keys.device).clamp_max(slots - 1).repeat(keys.shape[0], 1)
    total = keys[:, :slots].clone()
    number = torch.ones_like(total[..., :1])
    for start in range(slots, length, PERIOD):
        part = keys[:, start : start + PERIOD]
        slot[:, start : start + PERIOD] = chosen = _nearest(part, total / number)
        more, count = _centroids(part, chosen, slots)
        total, number = total + more, number + count
    return slot

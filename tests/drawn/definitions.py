"""What ring attention, ABC, its queues and Cottention compute, from their definitions: dense, in fp64, by autograd.

No code of the library is used. Bounded states are computed document by document, without padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor
INFINITE = float("inf")


def attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None, sink: Tensor | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (B, H, T, Dv), lse (B, H, T)); seen (B, T, T): i attends to j. A row that attends to nothing gets 0."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if slopes is not None:
        index = torch.arange(length)
        logits = logits - slopes[None, :, None, None] * (index[:, None] - index).abs()
    logits = logits.masked_fill(~seen[:, None], -INFINITE)
    if sink is not None:
        column = sink[None, :, None, None].expand(*logits.shape[:3], 1)
        logits, v = torch.cat([logits, column], 3), torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    sees_none = (logits == -INFINITE).all(3, keepdim=True)
    logits = logits.masked_fill(sees_none, 0.0)  # any finite number: the row is set to 0 below
    out = (logits.softmax(3) @ v).masked_fill(sees_none, 0.0)
    return out, logits.logsumexp(3).masked_fill(sees_none[..., 0], -INFINITE)


def same_document(ids: Tensor) -> Tensor:
    """(B, T, T): equal ids are one document for ring attention, adjacent or not; padding belongs to none."""
    return (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None] & (ids >= 0)[:, :, None]


def documents(row: tuple[int, ...]) -> list[list[int]]:
    """Return the tokens of each run of one id; padding does not end a run."""
    found: list[list[int]] = []
    last = None
    for place, name in enumerate(row):
        if name < 0:
            continue
        if name != last:
            found.append([])
        found[-1].append(place)
        last = name
    return found


def by_document(
    rows: list[tuple[int, ...]], tensors: list[Tensor], alone: Callable[..., Tensor], like: Tensor
) -> Tensor:
    """Call `alone` with the tensors of each document and scatter the results; 0 at padding; like (B, H, T, Dv)."""
    out = torch.zeros_like(like)
    for row, ids in enumerate(rows):
        for tokens in documents(ids):
            part = alone(*(x[row : row + 1, :, tokens] for x in tensors))
            out = out.index_put((torch.tensor([row])[:, None], torch.arange(out.shape[1])[None, :, None],
                                 torch.tensor(tokens)[None, None, :]), part)  # fmt: skip
    return out


def weights(s: Tensor, normalizer: str, causal: bool) -> Tensor:
    """(B, G, T, T, M): the weight of token j in a slot that token t reads."""
    length = s.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = (seen.tril() if causal else seen)[None, None, :, :, None]
    if normalizer == "sum":
        return torch.where(seen, s[:, :, None], 0.0)
    logits = s[:, :, None].expand(-1, -1, length, -1, -1).masked_fill(~seen, -INFINITE)
    none = (logits == -INFINITE).all(3, keepdim=True)
    safe = logits.masked_fill(none, 0.0)
    if normalizer == "prefix":
        return safe.softmax(3).masked_fill(none, 0.0)
    mass = safe.logsumexp(3)  # (B, G, T, M): of token j as a writer
    weight = (s - mass).masked_fill(none[:, :, :, 0], -INFINITE).exp()
    return torch.where(seen, weight[:, :, None], 0.0)


def abc(
    q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, normalizer: str, scale: float, causal: bool
) -> Tensor:
    """ABC of one document: a slot is a weighted sum of keys, and of values; queries read slots by softmax."""
    group = q.shape[1] // k.shape[1]
    of_keys, of_values = (weights(s, normalizer, causal) for s in (key, value))
    slots = torch.einsum("bgtjm,bgjd->bgtmd", of_keys, k).repeat_interleave(group, 1)
    contents = torch.einsum("bgtjm,bgjd->bgtmd", of_values, v).repeat_interleave(group, 1)
    written = (key > -INFINITE) if normalizer != "sum" else key != 0
    count = written.cumsum(2) if causal else written.sum(2, keepdim=True).expand_as(written)
    empty = (count == 0).repeat_interleave(group, 1)
    logits = (scale * torch.einsum("bhtd,bhtmd->bhtm", q, slots)).masked_fill(empty, -INFINITE)
    sees_none = empty.all(3, keepdim=True)
    p = logits.masked_fill(sees_none, 0.0).softmax(3).masked_fill(sees_none, 0.0)
    return torch.einsum("bhtm,bhtmd->bhtd", p, contents)


def queue(q: Tensor, k: Tensor, v: Tensor, entries: Callable[[int], list[list[int]]], scale: float) -> Tensor:
    """ABC's queues, of one document: token t attends to `entries(t)`, each the mean of some tokens."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    outs = []
    for t in range(q.shape[2]):
        keys, values = (torch.stack([x[:, :, e].mean(2) for e in entries(t)], 2) for x in (k, v))
        p = (scale * torch.einsum("bhd,bhnd->bhn", q[:, :, t], keys)).softmax(-1)
        outs.append(torch.einsum("bhn,bhnd->bhd", p, values))
    return torch.stack(outs, 2)


def window(slots: int) -> Callable[[int], list[list[int]]]:
    return lambda t: [[j] for j in range(max(t - slots + 1, 0), t + 1)]


def dilated(slots: int, rate: int) -> Callable[[int], list[list[int]]]:
    """The queue shifts at every rate-th token; in between its newest slot is overwritten."""

    def entries(t: int) -> list[list[int]]:
        held: list[int] = []
        for token in range(t + 1):
            held = [*held[:-1], token] if held and token % rate else [*held, token][-slots:]
        return [[token] for token in held]

    return entries


def compressive(slots: int, ratio: int) -> Callable[[int], list[list[int]]]:
    """Half of the slots hold the last tokens, the others means of `ratio` tokens older than these."""
    recent = slots - slots // 2

    def entries(t: int) -> list[list[int]]:
        gone = max(t + 1 - recent, 0) // ratio
        means = [list(range(i * ratio, (i + 1) * ratio)) for i in range(gone)]
        return means[max(gone - slots // 2, 0) :] + [[j] for j in range(max(t - recent + 1, 0), t + 1)]

    return entries


def cosine(q: Tensor, k: Tensor, v: Tensor, m: Tensor, scale_on: str, causal: bool) -> Tensor:
    """Cottention of one document; m (H,)."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    count = torch.arange(1, length + 1) if causal else torch.full((length,), length)
    size = count.double()[None, :] ** -torch.sigmoid(m)[:, None]
    scores = scores.tril() if causal else scores
    if scale_on == "value":
        return scores @ (v * size[..., None])
    return (scores @ v) * size[..., None]


def random_slot(head: int, index: int, seed: int, slots: int) -> int:
    """Return the slot that `random` draws for a token."""

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    return mixed(mixed((index + mixed((head + seed) % 2**64)) % 2**64)) % 2**62 % slots

"""Combine the states of two stretches of a sequence; each operation is associative and has an identity.

A state ends with `document` (B,) int64: the document it belongs to, -1 before any token. The earlier state counts only
where the later stretch wrote nothing or continues the same document. A document is a run of one id. If the last
document of a stretch began within that stretch, it continues nothing, even if the same id stands at the border: it is
then written as -2 - id (`begun`). Without documents all ids are 0.
"""

from __future__ import annotations

import torch

from longctx.bounded.ranks.exchange import Value


def identity(like: Value) -> Value:
    """Return the state of no tokens, in the shapes of `like`: log masses (B, G, M) are -inf, the rest is 0."""
    *members, document = like
    fills = (-torch.inf if x.dim() == 3 else 0.0 for x in members)
    return *(torch.full_like(x, fill) for x, fill in zip(members, fills, strict=True)), torch.full_like(document, -1)


def add(first: Value, second: Value) -> Value:
    """Add states that are sums, or token counts (B,): (state, ..., document)."""
    keep, document = _join(first[-1], second[-1])
    sums = (torch.where(_like(keep, a), a, a.new_zeros(())) + b for a, b in zip(first[:-1], second[:-1], strict=True))
    return *sums, document


def add_mass(first: Value, second: Value) -> Value:
    """Add masses in the log domain: (z, ..., document), each z (B, G, M)."""
    keep, document = _join(first[-1], second[-1])
    masses = (_log_add(a, b, keep)[0] for a, b in zip(first[:-1], second[:-1], strict=True))
    return *masses, document


def average(first: Value, second: Value) -> Value:
    """Merge states that are weighted means, each with its log mass: (z, state, z, state, ..., document).

    This is the merge of two partial softmax results, with slots in the place of queries.
    """
    keep, document = _join(first[-1], second[-1])
    merged: list[torch.Tensor] = []
    for at in range(0, len(first) - 1, 2):
        mass, share_first, share_second = _log_add(first[at], second[at], keep)
        mean = share_first[..., None] * first[at + 1] + share_second[..., None] * second[at + 1]
        merged += [mass, mean]
    return *merged, document


def total(first: Value, second: Value) -> Value:
    """Merge as `average` does, for states that are sums; the log mass only tells which slots were written."""
    keep, document = _join(first[-1], second[-1])
    merged: list[torch.Tensor] = []
    for at in range(0, len(first) - 1, 2):
        state = torch.where(_like(keep, first[at + 1]), first[at + 1], 0.0) + second[at + 1]
        merged += [_log_add(first[at], second[at], keep)[0], state]
    return *merged, document


def begun(document: torch.Tensor) -> torch.Tensor:
    """Mark documents (B,) that began after another one of their stretch; -1 stays."""
    return torch.where(document >= 0, -2 - document, document)


def name(document: torch.Tensor) -> torch.Tensor:
    """Return the ids of documents (B,), marked by `begun` or not; -1 stays."""
    return torch.where(document < -1, -2 - document, document)


def _join(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether the first state still counts (B,), and the document of both together."""
    keep = (second == -1) | ((second >= 0) & (name(first) == second))
    return keep, torch.where(keep, first, torch.where(first == -1, second, begun(second)))


def _like(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return mask.view(-1, *[1] * (x.dim() - 1))


def _log_add(a: torch.Tensor, b: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log(e^a + e^b) and the shares of a and of b in the sum; a is -inf where `keep` is False.

    Where both are -inf, the result is -inf and both shares are 0.
    """
    a = torch.where(_like(keep, a), a, -torch.inf)
    none = (a == -torch.inf) & (b == -torch.inf)
    a, b = (x.masked_fill(none, 0.0) for x in (a, b))
    total = torch.logaddexp(a, b)
    share_a, share_b = ((x - total).exp().masked_fill(none, 0.0) for x in (a, b))
    return total.masked_fill(none, -torch.inf), share_a, share_b

"""How the states of two stretches of a sequence combine; each is associative and has an identity.

A state ends with `document` (B,) int64: what the memory belongs to, -1 before any token. The earlier state counts only
where the later stretch wrote nothing or goes on with the same document. A document is a run of one id, so a stretch
whose last document began within it goes on with nothing, though the same id may stand at its border: it is named
-2 - id (`begun`). Without documents all ids are 0.
"""

from __future__ import annotations

import torch

from longctx.bounded.ranks.exchange import Value


def add(first: Value, second: Value) -> Value:
    """Memories that are sums: (memory, ..., document)."""
    keep, document = _joined(first[-1], second[-1])
    sums = (torch.where(_like(keep, a), a, a.new_zeros(())) + b for a, b in zip(first[:-1], second[:-1], strict=True))
    return *sums, document


def add_mass(first: Value, second: Value) -> Value:
    """Log masses: (z, ..., document), each (B, G, M)."""
    keep, document = _joined(first[-1], second[-1])
    masses = (_log_add(a, b, keep)[0] for a, b in zip(first[:-1], second[:-1], strict=True))
    return *masses, document


def average(first: Value, second: Value) -> Value:
    """Memories that are means, each with its log mass: (z, memory, z, memory, ..., document): the softmax merge, with
    slots in the place of queries."""
    keep, document = _joined(first[-1], second[-1])
    merged: list[torch.Tensor] = []
    for at in range(0, len(first) - 1, 2):
        mass, mine, theirs = _log_add(first[at], second[at], keep)
        memory = mine[..., None] * first[at + 1] + theirs[..., None] * second[at + 1]
        merged += [mass, memory]
    return *merged, document


def total(first: Value, second: Value) -> Value:
    """As `average`, for memories that are sums: the mass only tells what was written to."""
    keep, document = _joined(first[-1], second[-1])
    merged: list[torch.Tensor] = []
    for at in range(0, len(first) - 1, 2):
        memory = torch.where(_like(keep, first[at + 1]), first[at + 1], 0.0) + second[at + 1]
        merged += [_log_add(first[at], second[at], keep)[0], memory]
    return *merged, document


def latest(first: Value, second: Value) -> Value:
    """Token counts of the running document: (count (B,) int64, document)."""
    keep, document = _joined(first[-1], second[-1])
    return torch.where(keep, first[0], 0) + second[0], document


def begun(document: torch.Tensor) -> torch.Tensor:
    """Name a document (B,) that began behind another one of its stretch; -1 stays."""
    return torch.where(document >= 0, -2 - document, document)


def name(document: torch.Tensor) -> torch.Tensor:
    """The id of a document (B,), wherever it began; -1 stays."""
    return torch.where(document < -1, -2 - document, document)


def _joined(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether the first state still counts (B,), the document of both)."""
    keep = (second == -1) | ((second >= 0) & (name(first) == second))
    return keep, torch.where(keep, first, torch.where(first == -1, second, begun(second)))


def _like(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return mask.view(-1, *[1] * (x.dim() - 1))


def _log_add(a: torch.Tensor, b: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log(e^a + e^b), the share of a, the share of b); an a that does not count is -inf, two of them share nothing."""
    a = torch.where(_like(keep, a), a, -torch.inf)
    none = (a == -torch.inf) & (b == -torch.inf)
    a, b = (x.masked_fill(none, 0.0) for x in (a, b))
    total = torch.logaddexp(a, b)
    mine, theirs = ((x - total).exp().masked_fill(none, 0.0) for x in (a, b))
    return total.masked_fill(none, -torch.inf), mine, theirs

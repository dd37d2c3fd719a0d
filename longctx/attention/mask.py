"""`BlockMask`: which keys of one block each query of another sees, as plain data that any kernel can read.

It holds the global indices of both blocks (spans), the index rule (causal, window, length) and, for packed batches,
the document id of every token. For a tile, it returns that nothing is visible, that everything is, or a boolean mask:
the definition that tiles.py (CPU) and kernels/flash/tables.py (GPU) must agree with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from longctx.attention.band import Rule, band
from longctx.layout import Span


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Visibility of `k` tokens to `q` tokens.

    Attributes:
        q_spans, k_spans: global indices of the tokens, in local order.
        rule: causal, window and length, by global index.
        q_documents (B, Tq), k_documents (B, Tk): integer ids or None (both). A query sees only keys of its own
            document; a negative id is padding, which sees nothing and is not seen.
    """

    q_spans: tuple[Span, ...]
    k_spans: tuple[Span, ...]
    rule: Rule
    q_documents: torch.Tensor | None = None
    k_documents: torch.Tensor | None = None

    def row(self, index: int) -> BlockMask:
        """Return the mask of one batch row."""
        if self.q_documents is None or self.k_documents is None:
            return self
        row = slice(index, index + 1)
        return replace(self, q_documents=self.q_documents[row], k_documents=self.k_documents[row])

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> bool | torch.Tensor:
        """Return which keys [k0, k1) queries [q0, q1) see: False (none), True (all) or bool (B or 1, 1, q1-q0,
        k1-k0)."""
        verdicts = set()
        for q in _within(self.q_spans, q0, q1):
            for k in _within(self.k_spans, k0, k1):
                verdicts.add(self._verdict(q, k))
        if verdicts == {False}:
            return False
        allowed = None if verdicts == {True} else self._by_index(q0, q1, k0, k1)
        if self.q_documents is not None and self.k_documents is not None:
            q_ids, k_ids = self.q_documents[:, q0:q1], self.k_documents[:, k0:k1]
            # Two cases need no mask: all tokens are of one document, or the ranges of ids do not overlap.
            if q_ids.min() == q_ids.max() == k_ids.min() == k_ids.max() and q_ids[0, 0] >= 0:
                return True if allowed is None else allowed
            if int(q_ids.max()) < max(int(k_ids.min()), 0) or int(k_ids.max()) < max(int(q_ids.min()), 0):
                return False
            same = (q_ids[:, None, :, None] == k_ids[:, None, None, :]) & (q_ids >= 0)[:, None, :, None]
            allowed = same if allowed is None else allowed & same
        return True if allowed is None else allowed

    def _verdict(self, q: Span, k: Span) -> bool | None:
        """Return whether every pair is visible by index (True), none is (False), or some are (None)."""
        limits = band(q, k, self.rule)
        beyond = self.rule.length is not None and max(q.last, k.last) >= self.rule.length
        if limits is None:
            return False
        return True if limits == (1 - k.count, q.count - 1) and not beyond else None

    def _by_index(self, q0: int, q1: int, k0: int, k1: int) -> torch.Tensor:
        q, k = self.q_index[q0:q1, None], self.k_index[None, k0:k1]
        allowed = torch.ones((q1 - q0, k1 - k0), dtype=torch.bool, device=q.device)
        if self.rule.right is not None:
            allowed &= k - q <= self.rule.right
        if self.rule.left is not None:
            allowed &= q - k <= self.rule.left
        if self.rule.length is not None:
            allowed &= (q < self.rule.length) & (k < self.rule.length)
        return allowed[None, None]

    @cached_property
    def q_index(self) -> torch.Tensor:
        """(Tq,) int64: the queries' global indices, in local order."""
        return _indices(self.q_spans, self.q_documents)

    @cached_property
    def k_index(self) -> torch.Tensor:
        """(Tk,) int64: the keys' global indices, in local order."""
        return _indices(self.k_spans, self.k_documents)


def _indices(spans: tuple[Span, ...], documents: torch.Tensor | None) -> torch.Tensor:
    device = None if documents is None else documents.device
    return torch.cat([torch.arange(s.count, device=device) * s.stride + s.start for s in spans])


def _within(spans: tuple[Span, ...], begin: int, end: int) -> list[Span]:
    """Return the parts of the spans in local rows [begin, end)."""
    parts, offset = [], 0
    for span in spans:
        first, last = max(begin - offset, 0), min(end - offset, span.count)
        if first < last:
            parts.append(span.slice(first, last - first))
        offset += span.count
    return parts

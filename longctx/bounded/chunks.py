"""Split a sequence into chunks: blocks of equal chunks, which token reads which, and packed documents as runs of ids.

ABC and Cottention use the same scheme. Within a chunk attention is computed pair by pair, as matrix products; between
chunks only the state is carried. A block is a run of chunks that are computed together, small enough to stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from longctx.bounded.ranks import monoid

_PIECE = 2048


class Block(NamedTuple):
    """`chunks` chunks of `size` tokens, from local token `start` on."""

    start: int
    chunks: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.chunks * self.size

    def halves(self) -> tuple[Block, Block]:
        """Split into two blocks; a block of one chunk becomes two smaller chunks."""
        if self.chunks > 1:
            first = self.chunks // 2
            return self._replace(chunks=first), Block(self.start + first * self.size, self.chunks - first, self.size)
        first = self.size // 2
        return Block(self.start, 1, first), Block(self.start + first, 1, self.size - first)


def blocks(tokens: int, size: int, chunks: int) -> Iterator[Block]:
    """Split `tokens` tokens into blocks of up to `chunks` chunks of `size` tokens; a shorter chunk comes last."""
    whole = tokens // size
    for first in range(0, whole, chunks):
        yield Block(first * size, min(chunks, whole - first), size)
    if tokens % size:
        yield Block(whole * size, 1, tokens % size)


def fold(x: torch.Tensor, block: Block, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the block of x (B, H, T, X) as (B, heads, chunks, H / heads * size, X), a view where possible."""
    part = x[:, :, block.start : block.stop].to(dtype)
    part = part.reshape(x.shape[0], heads, -1, block.chunks, block.size, x.shape[3])
    return part.transpose(2, 3).flatten(3, 4)


def unfold(out: torch.Tensor, block: Block, part: torch.Tensor) -> None:
    """Write a part in `fold`'s shape back into its block of out (B, H, T, X)."""
    shaped = part.unflatten(3, (-1, block.size)).transpose(2, 3)
    here = out[:, :, block.start : block.stop]
    here.copy_(shaped.reshape(here.shape))


def pieces(length: int, tokens: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Yield slices of up to 2048 tokens, each with the mask (B, 1, n, 1) of its excluded tokens, or None.

    Args:
        tokens: (B, T) bool, which tokens are included; None: all.
    """
    for first in range(0, length, _PIECE):
        here = slice(first, first + _PIECE)
        yield here, None if tokens is None else ~tokens[:, None, here, None]


@dataclass(frozen=True)
class ChunkMasks:
    """Which token reads what in the chunks of a block, as factors 0 and 1; None stands for all 1.

    visible: (C, C) or (B, 1, chunks, C, C), row t reads column j.
    before: (B, 1, chunks, C, 1), t belongs to the document of the state before its chunk.
    after: as before, j belongs to the document of the state after its chunk.
    kept: (B, 1, chunks, 1, 1), both states belong to the same document.
    valid: as before, but bool: t is not padding.
    """

    visible: torch.Tensor
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    def mask_pairs(self, scores: torch.Tensor) -> torch.Tensor:
        """Set scores (B, G, chunks, n * C, C) to 0 where row t does not read column j; in place."""
        size = self.visible.shape[-1]
        scores.unflatten(3, (-1, size)).mul_(self.visible if self.before is None else self.visible[:, :, :, None])
        return scores

    def mask_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (B, G, chunks, n * C, X) with 0 in rows that do not read the state before their chunk."""
        if self.before is None:
            return x
        return (x.unflatten(3, (-1, self.visible.shape[-1])) * self.before[:, :, :, None]).flatten(3, 4)

    def add_read(self, out: torch.Tensor, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Add x @ state to out, in rows that read the state before their chunk; in place."""
        if self.before is None:
            return _add_product(out, x, state)
        return out.add_(self.mask_rows(x @ state))

    def add_written(self, out: torch.Tensor, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Add x @ state to out, for tokens of the document of the state after their chunk; in place."""
        if self.after is None:
            return _add_product(out, x, state)
        return out.add_(times(x @ state, self.after))


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """out += a @ b over the chunks of a block, in one operator; out is contiguous."""
    out.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return out


def times(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Return x * factor, where None is 1."""
    return x if factor is None else x * factor


def causal_masks(size: int, dtype: torch.dtype, device: torch.device) -> ChunkMasks:
    """Return the masks of chunks with one document and no padding."""
    return ChunkMasks(torch.ones(size, size, dtype=dtype, device=device).tril_())


class Runs:
    """The documents of each row of tokens; each document is a run of one id. Padding (-1) does not end a run.

    An id that returns after another id is a new document. So runs are numbered and the numbers are compared:
    `ids` (B, T) is 0 for tokens that continue the state's document, then 1, 2, ...; -1 at padding.

    Args:
        ids: (B, T) int64 document ids.
        document: (B,) int64, the document of the state before the first token; None: no document.
    """

    def __init__(self, ids: torch.Tensor, document: torch.Tensor | None) -> None:
        first = torch.full_like(ids[:, :1], -1) if document is None else document.to(ids)[:, None]
        known = torch.cat([first, ids], 1)
        index = torch.arange(known.shape[1], device=ids.device)
        latest = torch.where(known >= 0, index, 0).cummax(1).values
        names = known.gather(1, latest)  # names[:, t]: the document of the last valid token before t
        self._begins = (ids >= 0) & (ids != names[:, :-1])
        numbers = self._begins.cumsum(1)
        self.ids, self._names = numbers.masked_fill(ids < 0, -1), names
        self._latest = torch.cat([torch.zeros_like(numbers[:, :1]), numbers], 1)  # the run of that token

    @property
    def document(self) -> torch.Tensor:
        """(B,) id of the last valid token."""
        return self._names[:, -1]

    @property
    def single(self) -> torch.Tensor:
        """(B,) whether all tokens belong to one document."""
        return self._latest[:, -1] <= 1

    @property
    def ending(self) -> torch.Tensor:
        """(B,) the last document in the notation of ranks/monoid.py."""
        return torch.where(self.single, self.document, monoid.begun(self.document))

    def edges(self, size: int) -> torch.Tensor:
        """Return (B, chunks + 1): the run of the state before each chunk of `size` tokens, and after the last."""
        ends = torch.arange(0, self._latest.shape[1] + size - 1, size, device=self.ids.device)
        return self._latest[:, ends.clamp_max(self.ids.shape[1])].contiguous()

    def masks(self, block: Block, dtype: torch.dtype) -> ChunkMasks:
        """Return the masks of a block's chunks."""
        ids = self.ids[:, block.start : block.stop].unflatten(1, (block.chunks, block.size))[:, None, :, :, None]
        edges = self._latest[:, block.start : block.stop + 1 : block.size][:, None, :, None, None]
        before, after, valid = edges[:, :, :-1], edges[:, :, 1:], ids >= 0
        visible = ((ids == ids.transpose(-1, -2)) & valid).tril()
        masks = (visible, (ids == before) & valid, (ids == after) & valid, before == after)
        seen, first, last, kept = (x.to(dtype) for x in masks)
        return ChunkMasks(seen, first, last, kept, valid)

    def counts(self, count: torch.Tensor | None) -> torch.Tensor:
        """Count, for each token, the valid tokens of its document up to and including it: (B, T) int64.

        Args:
            count: (B,) tokens of the state's document before the first token; None: 0.
        """
        total = (self.ids >= 0).cumsum(1)
        base = torch.where(self._begins, total - 1, 0).cummax(1).values  # valid tokens of all earlier documents
        carried = torch.zeros_like(base[:, 0]) if count is None else count.to(base)
        return total - base + torch.where(self._begins.cumsum(1) > 0, 0, carried[:, None])

    def tail(self) -> torch.Tensor:
        """Return (B, T) bool: the tokens of the last document."""
        return (self.ids == self._latest[:, -1:]) & (self.ids >= 0)

    def head(self) -> torch.Tensor:
        """Return (B, T) bool: the tokens of the first document that is not the state's."""
        return self.ids == 1

    def before(self) -> torch.Tensor:
        """Return (B, T) bool: the tokens that continue the document of the state before the first token."""
        return self.ids == 0

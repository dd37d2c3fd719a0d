"""How a sequence is cut into chunks: blocks of equal chunks, which token sees which, what passes from chunk to chunk.

Both bounded memories are computed alike. Inside a chunk every pair of tokens meets in a matrix product; between chunks
only the state travels. A block is a row of chunks that are computed together, small enough to stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from longctx.bounded.ranks import monoid


class Block(NamedTuple):
    """`chunks` chunks of `size` tokens, from local token `start` on."""

    start: int
    chunks: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.chunks * self.size

    def halves(self) -> tuple[Block, Block]:
        """The same tokens in two blocks; a block of one chunk gives two smaller chunks."""
        if self.chunks > 1:
            first = self.chunks // 2
            return self._replace(chunks=first), Block(self.start + first * self.size, self.chunks - first, self.size)
        first = self.size // 2
        return Block(self.start, 1, first), Block(self.start + first, 1, self.size - first)


def blocks(tokens: int, size: int, chunks: int) -> Iterator[Block]:
    """Cut `tokens` tokens into blocks of up to `chunks` chunks of `size` tokens; a shorter chunk comes last."""
    whole = tokens // size
    for first in range(0, whole, chunks):
        yield Block(first * size, min(chunks, whole - first), size)
    if tokens % size:
        yield Block(whole * size, 1, tokens % size)


def fold(x: torch.Tensor, block: Block, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """The block of x (B, H, T, X) as (B, heads, chunks, H / heads * size, X), H / heads rows a token; or a view."""
    part = x[:, :, block.start : block.stop].to(dtype)
    part = part.reshape(x.shape[0], heads, -1, block.chunks, block.size, x.shape[3])
    return part.transpose(2, 3).flatten(3, 4)


def unfold(out: torch.Tensor, block: Block, part: torch.Tensor) -> None:
    """Write what `fold` would have cut out back into out (B, H, T, X)."""
    shaped = part.unflatten(3, (-1, block.size)).transpose(2, 3)
    here = out[:, :, block.start : block.stop]
    here.copy_(shaped.reshape(here.shape))


@dataclass(frozen=True)
class Sight:
    """Who sees whom in the chunks of a block, as factors 0 and 1; None stands for all 1.

    visible (C, C) or (B, 1, chunks, C, C): row t reads column j. before (B, 1, chunks, C, 1): t is of the document that
    the state before the chunk belongs to. after, of the same shape: j is of the document of the state after it. kept
    (B, 1, chunks, 1, 1): that document is the same. valid, as before: no padding.
    """

    visible: torch.Tensor
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    def pairs(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, G, chunks, n * C, C) with 0 where a row must not read; in place."""
        size = self.visible.shape[-1]
        scores.unflatten(3, (-1, size)).mul_(self.visible if self.before is None else self.visible[:, :, :, None])
        return scores

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, G, chunks, n * C, X) with 0 in rows that do not read the state before their chunk."""
        if self.before is None:
            return x
        return (x.unflatten(3, (-1, self.visible.shape[-1])) * self.before[:, :, :, None]).flatten(3, 4)

    def add_read(self, out: torch.Tensor, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """out += x memory, in rows that read the state before their chunk; in place."""
        if self.before is None:
            return _add_product(out, x, memory)
        return out.add_(self.rows(x @ memory))

    def add_written(self, out: torch.Tensor, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """out += x memory, for tokens of the document of the state after their chunk; in place."""
        if self.after is None:
            return _add_product(out, x, memory)
        return out.add_(times(x @ memory, self.after))


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """out += a b over the chunks of a block, as one operator; out is contiguous."""
    out.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return out


def times(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """x * factor, where None is 1."""
    return x if factor is None else x * factor


class Runs:
    """The documents of a row of tokens, each a run of one id; -1 is padding, which ends no run.

    An id that comes back after another one is a new document. So runs are numbered, and numbers are compared:
    `ids` (B, T) are 0 for tokens that go on with the state's document, then 1, 2, ...; -1 at padding.

    Args:
        ids: (B, T) int64, as users name documents.
        document: (B,) int64, what the state before the first token belongs to; None: to nothing.
    """

    def __init__(self, ids: torch.Tensor, document: torch.Tensor | None) -> None:
        first = torch.full_like(ids[:, :1], -1) if document is None else document.to(ids)[:, None]
        known = torch.cat([first, ids], 1)
        place = torch.arange(known.shape[1], device=ids.device)
        latest = torch.where(known >= 0, place, 0).cummax(1).values
        names = known.gather(1, latest)  # names[:, t]: the document of the last valid token before t
        self._begins = (ids >= 0) & (ids != names[:, :-1])
        numbers = self._begins.cumsum(1)
        self.ids, self._names = numbers.masked_fill(ids < 0, -1), names
        self._latest = torch.cat([torch.zeros_like(numbers[:, :1]), numbers], 1)  # the run of that token

    @property
    def document(self) -> torch.Tensor:
        """(B,) the document of the last valid token, by the user's name."""
        return self._names[:, -1]

    @property
    def single(self) -> torch.Tensor:
        """(B,) whether all tokens are of one document."""
        return self._latest[:, -1] <= 1

    @property
    def ending(self) -> torch.Tensor:
        """(B,) the last document as the states of stretches name it (monoid.py)."""
        return torch.where(self.single, self.document, monoid.begun(self.document))

    def edges(self, size: int) -> torch.Tensor:
        """(B, chunks + 1): the run of the state before each chunk of `size` tokens, and after the last."""
        ends = torch.arange(0, self._latest.shape[1] + size - 1, size, device=self.ids.device)
        return self._latest[:, ends.clamp_max(self.ids.shape[1])].contiguous()

    def sight(self, block: Block, dtype: torch.dtype) -> Sight:
        """Who sees whom in a block."""
        ids = self.ids[:, block.start : block.stop].unflatten(1, (block.chunks, block.size))[:, None, :, :, None]
        edges = self._latest[:, block.start : block.stop + 1 : block.size][:, None, :, None, None]
        before, after, valid = edges[:, :, :-1], edges[:, :, 1:], ids >= 0
        visible = ((ids == ids.transpose(-1, -2)) & valid).tril()
        sights = (visible, (ids == before) & valid, (ids == after) & valid, before == after)
        seen, first, last, kept = (x.to(dtype) for x in sights)
        return Sight(seen, first, last, kept, valid)

    def counts(self, count: torch.Tensor | None) -> torch.Tensor:
        """(B, T) int64: valid tokens of the token's own document up to and with it; `count` (B,) came before."""
        valid = self.ids >= 0
        total = valid.cumsum(1)
        starts = self._begins
        base = torch.where(starts, total - 1, 0).cummax(1).values  # what earlier documents have counted
        carried = torch.zeros_like(base[:, 0]) if count is None else count.to(base)
        return total - base + torch.where(starts.cumsum(1) > 0, 0, carried[:, None])

    def tail(self) -> torch.Tensor:
        """(B, T) whether a token is of the last document."""
        return (self.ids == self._latest[:, -1:]) & (self.ids >= 0)

    def head(self) -> torch.Tensor:
        """(B, T) whether a token is of the first document that is not the state's."""
        return self.ids == 1

    def before(self) -> torch.Tensor:
        """(B, T) whether a token goes on with the document of the state before the first."""
        return self.ids == 0


def causal_sight(size: int, dtype: torch.dtype, device: torch.device) -> Sight:
    """One document and no padding."""
    return Sight(torch.ones(size, size, dtype=dtype, device=device).tril_())

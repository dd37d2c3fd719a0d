"""Walk over a local sequence block by block, in the chunked forms of ABC and Cottention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from longctx.attention.backends.base import accumulator_dtype
from longctx.bounded.chunks import Block, ChunkMasks, Runs, blocks, causal_masks, fold

CHUNK = 64
"""Tokens per chunk."""
BLOCK_ROWS = 4096
"""Rows of queries, over batch and heads, that are computed together."""


def blocks_of(q: torch.Tensor, chunk: int) -> Iterator[Block]:
    """Yield the blocks of queries (B, H, T, D) with chunks of `chunk` tokens."""
    return blocks(q.shape[2], chunk, _chunks_per_block(q, chunk))


def block_count(q: torch.Tensor, chunk: int) -> int:
    """Return the number of blocks that `blocks_of` yields; shapes may be symbolic."""
    whole = q.shape[2] // chunk
    return -(-whole // _chunks_per_block(q, chunk)) + -(-(q.shape[2] - whole * chunk) // chunk)


def _chunks_per_block(q: torch.Tensor, chunk: int) -> int:
    return max(BLOCK_ROWS // max(q.shape[0] * q.shape[1] * chunk, 1), 1)


class ChunkWalk:
    """The inputs of one call, block by block, in the accumulator's dtype (fp32, fp64 for fp64).

    Args:
        q: (B, H, T, D). k: (B, G, T, D). v: (B, G, T, Dv).
        ids: (B, T), document: (B,), as in `Runs`; None for one document.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ids: torch.Tensor | None,
        document: torch.Tensor | None,
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.dtype = accumulator_dtype(q.dtype)
        self._runs = None if ids is None else Runs(ids, document)
        self._causal: dict[int, ChunkMasks] = {}

    def fold(self, x: torch.Tensor, block: Block) -> torch.Tensor:
        """Return the block of x as (B, G, chunks, n * C, X)."""
        return fold(x, block, self.k.shape[1], self.dtype)

    def inputs(self, block: Block, masks: ChunkMasks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the block's q, k and v, with 0 at padding whatever it holds, NaN included."""
        q, k, v = (self.fold(x, block) for x in (self.q, self.k, self.v))
        if masks.valid is not None:
            k, v = (x.masked_fill(~masks.valid, 0.0) for x in (k, v))
            q = q.unflatten(3, (-1, block.size)).masked_fill(~masks.valid[:, :, :, None], 0.0).flatten(3, 4)
        return q, k, v

    def masks(self, block: Block) -> ChunkMasks:
        """Return the block's masks; without documents they depend on the chunk's size alone and are made once."""
        if self._runs is not None:
            return self._runs.masks(block, self.dtype)
        if block.size not in self._causal:
            self._causal[block.size] = causal_masks(block.size, self.dtype, self.q.device)
        return self._causal[block.size]

"""One attention over a context that is spread over ranks: each attends to what it holds, one exchange merges.

A rank's partial result is (out, lse); ranks gather all partials and merge them in rank order, so every rank gets the
same bits and goes on to the same next token. A query and head sends D + 1 numbers of fp32, whatever the context's
length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from longctx.attention.block import block_attention
from longctx.attention.merge import Partial, identity, merge_
from longctx.decode.attend import decode_attention, on_kernels
from longctx.mesh import Mesh


@dataclass
class Places:
    """Which tokens of a context this rank holds: its part of the prompt as it lay, and every ranks-th new token."""

    rank: int
    ranks: int
    prompt: int
    """Tokens of the prompt, the same on every rank."""
    positions: torch.Tensor
    """(S,) int64: global indices of the local part of the prompt, padding included."""
    documents: torch.Tensor
    """(B, S) int32: 0, or -1 at padding."""

    def owned(self, start: int, stop: int) -> list[int]:
        """Which of the tokens start..stop, all after the prompt, come to this rank: offsets from start."""
        return [at - start for at in range(start, stop) if (at - self.prompt) % self.ranks == self.rank]

    def visible(self, seen: int, queries: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the tokens held here the last ``queries`` of ``seen`` tokens see.

        Returns:
            (B, T, S) bool for the local part of the prompt, and (1, T, n) bool for the new tokens.
        """
        device = self.positions.device
        rows = torch.arange(seen - queries, seen, device=device)[:, None]
        new = torch.tensor(self.owned(self.prompt, seen), dtype=torch.int64, device=device) + self.prompt

        def near(keys: torch.Tensor) -> torch.Tensor:
            return (keys <= rows) & (keys > rows - window if window is not None else keys <= rows)

        return (self.documents >= 0)[:, None] & near(self.positions), near(new)[None]


@dataclass
class MergeCounters:
    """What this process has received in merges since the last reset()."""

    merges: int = 0
    bytes: int = 0

    def reset(self) -> None:
        self.merges = self.bytes = 0


counters = MergeCounters()


def merge_over_ranks(partial: Partial, mesh: Mesh) -> Partial:
    """Merge every rank's attention over its own keys: one all-gather, (ranks - 1) * queries * (D + 1) * 4 bytes here.

    Args:
        partial: out (B, H, T, D) and lse (B, H, T) over this rank's keys, fp32 or fp64; (0, -inf) where it has none.

    Returns:
        out and lse over all ranks' keys, the same bits on every rank of the sequence group.
    """
    ranks = mesh.sequence_size
    if ranks == 1:
        return partial
    mine = torch.cat((partial[0], partial[1][..., None]), -1)
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(gathered, mine.contiguous(), group=mesh.sequence_group)
    counters.merges += 1
    counters.bytes += (ranks - 1) * mine.numel() * mine.element_size()
    out, lse = gathered[0][..., :-1].contiguous(), gathered[0][..., -1].contiguous()
    for other in gathered[1:]:
        merge_(out, lse, other[..., :-1], other[..., -1])
    return out, lse


def attend_part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> Partial:
    """Attention of q to the keys that are here, as a part of a larger one.

    Args:
        q: (B * beams, H, T, D); beams of a row read its keys in one product.
        k: (B, G, S, D) and v: (B, G, S, Dv) with any S, 0 included.
        visible: (B or 1, T, S) bool.
        sink: (H,), on one rank only.
        backend: of longctx/decode/attend.py.

    Returns:
        out (B * beams, H, T, Dv) and lse (B * beams, H, T), fp32 or fp64.
    """
    if on_kernels(backend, q, k, v, sink):
        mask = visible if len(visible) == 1 else visible.repeat_interleave(len(q) // len(k), 0)
        return decode_attention(q, k, v, mask=mask[:, None], scale=scale, softcap=softcap, sink=sink)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads = k.shape[0], q.shape[1]
    rows = []
    for t in range(q.shape[2]):
        row = q[:, :, t].unflatten(0, (batch, -1)).transpose(1, 2)  # (B, H, beams, D)
        beams = row.shape[2]
        if k.shape[2] == 0:
            out, lse = identity((batch, heads, beams, v.shape[3]), dtype, q.device)
            lse = lse if sink is None else sink.to(dtype)[None, :, None].expand_as(lse)
        else:
            keys = torch.where(visible[:, t], 0, -1).to(torch.int32).expand(batch, -1)
            out, lse = block_attention(
                row, k, v, causal=False, document_ids=torch.zeros_like(keys[:, :1]).expand(batch, beams),
                key_document_ids=keys, scale=scale, softcap=softcap, sink=sink,
            )  # fmt: skip
        rows.append((out.to(dtype).transpose(1, 2).flatten(0, 1), lse.to(dtype).transpose(1, 2).flatten(0, 1)))
    return torch.stack([out for out, _ in rows], 2), torch.stack([lse for _, lse in rows], 2)

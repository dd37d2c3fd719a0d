"""Attention to a context that is sharded over ranks: each attends to its own keys; one all-gather merges the results.

A partial result is (out, lse). Ranks gather all partials and merge them in rank order, so every rank gets bitwise equal
results and generates the same next token. A rank sends D_v + 1 fp32 numbers per query and head, independent of the
context's length. Equations: docs/methods/el.md "Decode step", docs/methods/blockwise.md "Merge".
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
class ContextShard:
    """Which tokens of a context this rank holds: its shard of the prompt, and every ranks-th of the new tokens."""

    rank: int
    ranks: int
    prompt_length: int
    """Tokens of the whole prompt, the same on every rank."""
    positions: torch.Tensor
    """(S,) int64: global indices of the local tokens of the prompt, padding included."""
    documents: torch.Tensor
    """(B, S) int32: 0, or -1 at padding."""

    def owned(self, start: int, stop: int) -> list[int]:
        """Return which of the new tokens start..stop this rank holds, as offsets from start."""
        return [at - start for at in range(start, stop) if (at - self.prompt_length) % self.ranks == self.rank]

    def visible(self, seen: int, queries: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of the tokens of this rank are visible to the last ``queries`` of ``seen`` tokens.

        Returns:
            (B, T, S) bool for the local tokens of the prompt, and (1, T, n) bool for the local new tokens.
        """
        device, start = self.positions.device, self.prompt_length
        rows = torch.arange(seen - queries, seen, device=device)[:, None]
        new = torch.tensor(self.owned(start, seen), dtype=torch.int64, device=device) + start

        def in_window(keys: torch.Tensor) -> torch.Tensor:
            return (keys <= rows) & (keys > rows - window if window is not None else keys <= rows)

        return (self.documents >= 0)[:, None] & in_window(self.positions), in_window(new)[None]


@dataclass
class MergeCounters:
    """What this process has received in merges since the last reset()."""

    merges: int = 0
    bytes: int = 0

    def reset(self) -> None:
        self.merges = self.bytes = 0


counters = MergeCounters()


def merge_over_ranks(partial: Partial, mesh: Mesh) -> Partial:
    """Merge every rank's attention over its own keys with one all-gather.

    A rank receives (ranks - 1) * B * H * T * (D + 1) numbers.

    Args:
        partial: out (B, H, T, D) and lse (B, H, T) over this rank's keys, fp32 or fp64; (0, -inf) if it has none.

    Returns:
        out and lse over all ranks' keys, bitwise equal on every rank of the sequence group.
    """
    ranks = mesh.sequence_size
    if ranks == 1:
        return partial
    mine = torch.cat((partial[0], partial[1][..., None]), -1)
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(gathered, mine.contiguous(), group=mesh.sequence_group)
    counters.merges += 1
    counters.bytes += (ranks - 1) * mine.numel() * mine.element_size()
    # In rank order on every rank: the merge rounds, so another order could select another token.
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
    """Attend q to the keys of this rank; the result is to be merged with those of other keys.

    Args:
        q: (B * beams, H, T, D); the beams of a row share its keys.
        k: (B, G, S, D) and v: (B, G, S, Dv) with any S, including 0.
        visible: (B or 1, T, S) bool.
        sink: (H,), to be given on one rank only.
        backend: as in `decode_attention`.

    Returns:
        out (B * beams, H, T, Dv) and lse (B * beams, H, T), fp32 or fp64.
    """
    if on_kernels(backend, q, k, v, sink):
        mask = visible if len(visible) == 1 else visible.repeat_interleave(len(q) // len(k), 0)
        return decode_attention(q, k, v, mask=mask[:, None], scale=scale, softcap=softcap, sink=sink)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads = k.shape[0], q.shape[1]
    # Without kernels: one block_attention per new token, with the beams as its queries, so that all beams of a row read
    # its keys in one product. Key document 0 is visible, -1 is not.
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

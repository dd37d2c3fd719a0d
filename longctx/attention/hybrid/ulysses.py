"""The all-to-all of Ulysses: tokens of all heads -> all tokens of some heads, within a ulysses group, and back.

Before, each of U ranks holds T tokens of all heads. After, each holds all U * T tokens of its own heads, in the local
order of the ring rank: `layout.member_spans` splits a ring rank's sequence over its group in order, so concatenating in
the group's order restores it. All tensors of one exchange travel in one message per peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from longctx.attention.comm import Counters, counters
from longctx.attention.heads import Share
from longctx.mesh import Mesh

QUERIES, KEYS, PER_TOKEN = "queries", "keys", "per_token"
"""What dimension 1 of a tensor counts: query heads, key heads, or tokens (every rank gets the whole group's)."""

_ALIGNMENT = 16  # bytes: each tensor in a message begins at an address that any dtype may have


class UlyssesGroup(Protocol):
    """This rank's end of the all-to-all."""

    size: int
    rank: int

    def all_to_all(
        self, sent: torch.Tensor, send_sizes: list[int], received: torch.Tensor, receive_sizes: list[int]
    ) -> None:
        """Send piece i of `sent` to rank i of the group and receive their pieces in order. uint8; sizes in bytes."""


class ProcessUlyssesGroup:
    """Processes, over the mesh's ulysses communicator."""

    def __init__(self, mesh: Mesh) -> None:
        self.size, self.rank, self._group = mesh.ulysses_size, mesh.ulysses_rank, mesh.ulysses_group

    def all_to_all(
        self, sent: torch.Tensor, send_sizes: list[int], received: torch.Tensor, receive_sizes: list[int]
    ) -> None:
        count_exchange(self.rank, send_sizes)
        dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=self._group)


def count_exchange(rank: int, send_sizes: list[int], counters: Counters = counters) -> None:
    """Count what is about to be sent, without this rank's own piece."""
    nbytes = sum(send_sizes) - send_sizes[rank]
    counters.exchanges += 1
    counters.messages += len(send_sizes) - 1
    counters.bytes += nbytes
    counters.exchange_bytes += nbytes


@dataclass(frozen=True)
class HeadExchange:
    """Tensors from tokens to heads and back, for one assignment of heads to ranks.

    Both directions take pairs (QUERIES or KEYS, a tensor (B, heads, tokens, ...)). `to_heads` also takes pairs
    (PER_TOKEN, (B, tokens)); `to_tokens` does not.
    """

    group: UlyssesGroup
    shares: tuple[Share, ...]

    def to_heads(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Exchange this rank's tokens of all heads for the group's tokens of this rank's heads (PER_TOKEN: for the
        group's tokens): (B, heads, T, ...) -> (B, own heads, U * T, ...)."""
        mine = self.shares[self.group.rank]
        outgoing = [[_heads(x, kind, share) for kind, x in tensors] for share in self.shares]
        templates = [_heads(x, kind, mine) for kind, x in tensors]
        arrived = _all_to_all(self.group, outgoing, [templates] * self.group.size)
        return [
            torch.cat(parts, 1 if kind == PER_TOKEN else 2)
            for (kind, _), parts in zip(tensors, zip(*arrived, strict=True), strict=True)
        ]

    def to_tokens(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Exchange the group's tokens of this rank's heads for this rank's tokens of all heads: (B, own heads, U * T,
        ...) -> (B, heads, T, ...), in the same dtype. Several ranks' parts of one key head are summed."""
        tokens = tensors[0][1].shape[2] // self.group.size
        outgoing = [
            [x[:, :, rank * tokens : (rank + 1) * tokens] for _, x in tensors] for rank in range(self.group.size)
        ]
        templates = [
            [_resized(outgoing[0][i], kind, share) for i, (kind, _) in enumerate(tensors)] for share in self.shares
        ]
        arrived = _all_to_all(self.group, outgoing, templates)
        return [
            self._join_heads(kind, parts) for (kind, _), parts in zip(tensors, zip(*arrived, strict=True), strict=True)
        ]

    def _join_heads(self, kind: str, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return all heads of this rank's tokens from every rank's heads of them."""
        key_heads = self.shares[-1].keys.stop
        copied = sum(share.key_count for share in self.shares) > key_heads  # some key head is on several ranks
        if kind == QUERIES or not copied:
            return torch.cat(parts, 1)
        batch, _, *rest = parts[0].shape
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        total = parts[0].new_zeros((batch, key_heads, *rest), dtype=dtype)
        for share, part in zip(self.shares, parts, strict=True):
            total[:, share.keys] += part
        return total.to(parts[0].dtype)


def _heads(x: torch.Tensor, kind: str, share: Share) -> torch.Tensor:
    if kind == PER_TOKEN:
        return x
    return x[:, share.queries if kind == QUERIES else share.keys]


def _resized(x: torch.Tensor, kind: str, share: Share) -> torch.Tensor:
    """Return a view with x's dtype, and x's shape but for that share's number of heads."""
    heads = share.query_count if kind == QUERIES else share.key_count
    return x[:, :1].expand(x.shape[0], heads, *x.shape[2:])


def _all_to_all(
    group: UlyssesGroup, outgoing: list[list[torch.Tensor]], templates: list[list[torch.Tensor]]
) -> list[list[torch.Tensor]]:
    """Send outgoing[i] to rank i of the group; return what each rank sent, in the shapes and dtypes of templates[i]."""
    device = outgoing[0][0].device
    send_sizes, receive_sizes = ([sum(map(_nbytes, tensors)) for tensors in each] for each in (outgoing, templates))
    sent = torch.empty(sum(send_sizes), dtype=torch.uint8, device=device)
    received = torch.empty(sum(receive_sizes), dtype=torch.uint8, device=device)
    for views, tensors in zip(_views(sent, outgoing), outgoing, strict=True):
        for view, x in zip(views, tensors, strict=True):
            view.copy_(x)
    group.all_to_all(sent, send_sizes, received, receive_sizes)
    return _views(received, templates)


def _nbytes(x: torch.Tensor) -> int:
    """Return x's bytes in a message, rounded up to where the next tensor may begin."""
    return -(-x.numel() * x.element_size() // _ALIGNMENT) * _ALIGNMENT


def _views(buffer: torch.Tensor, groups: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Return consecutive parts of the buffer as tensors of the groups' shapes and dtypes."""
    offset, result = 0, []
    for group in groups:
        views = []
        for x in group:
            piece = buffer[offset : offset + x.numel() * x.element_size()]
            views.append(piece.view(x.dtype).view(x.shape))
            offset += _nbytes(x)
        result.append(views)
    return result

"""The exchange of heads for tokens between the ulysses members of one ring rank, and back.

Before: each of U members holds T tokens of all heads. After: each holds all U * T tokens of its own heads, in the local
order of the ring rank (layout.member_spans deals a ring rank's sequence out to its members in order, so members in
order restore it). All tensors of one exchange travel in one message a member.
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

QUERIES, KEYS, ROWS = "queries", "keys", "rows"
"""What dimension 1 of a tensor counts: query heads, key heads, or tokens (every member gets the others' as well)."""

_ALIGNMENT = 16  # bytes: a part of a message begins where any dtype may


class Members(Protocol):
    """This rank's end of an exchange."""

    size: int
    rank: int

    def swap(self, sent: torch.Tensor, send_sizes: list[int], received: torch.Tensor, receive_sizes: list[int]) -> None:
        """Send sent's piece i to member i and fill received with what they send, in order; bytes, sizes in bytes."""


class ProcessMembers:
    """Processes, over the mesh's ulysses communicator."""

    def __init__(self, mesh: Mesh) -> None:
        self.size, self.rank, self._group = mesh.ulysses_size, mesh.ulysses_rank, mesh.ulysses_group

    def swap(self, sent: torch.Tensor, send_sizes: list[int], received: torch.Tensor, receive_sizes: list[int]) -> None:
        count_exchange(self.rank, send_sizes)
        dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=self._group)


def count_exchange(rank: int, send_sizes: list[int], counters: Counters = counters) -> None:
    """Book what is about to be sent; what stays here does not count."""
    nbytes = sum(send_sizes) - send_sizes[rank]
    counters.exchanges += 1
    counters.messages += len(send_sizes) - 1
    counters.bytes += nbytes
    counters.exchange_bytes += nbytes


@dataclass(frozen=True)
class Exchange:
    """Tensors to heads and back, for one division of the heads.

    Args of both ways: pairs (what dimension 1 counts, a tensor (B, heads, tokens, ...) or (B, tokens) for ROWS).
    """

    members: Members
    shares: tuple[Share, ...]

    def to_heads(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        """This rank's tokens of all heads -> all members' tokens of this rank's heads (ROWS: of all members)."""
        mine = self.shares[self.members.rank]
        outgoing = [[_heads(x, kind, share) for kind, x in tensors] for share in self.shares]
        likes = [_heads(x, kind, mine) for kind, x in tensors]
        arrived = _swap(self.members, outgoing, [likes] * self.members.size)
        return [
            torch.cat(parts, 1 if kind == ROWS else 2)
            for (kind, _), parts in zip(tensors, zip(*arrived, strict=True), strict=True)
        ]

    def to_tokens(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        """All members' tokens of this rank's heads -> this rank's tokens of all heads; copies of a key head add up."""
        tokens = tensors[0][1].shape[2] // self.members.size
        outgoing = [
            [x[:, :, member * tokens : (member + 1) * tokens] for _, x in tensors]
            for member in range(self.members.size)
        ]
        likes = [
            [_resized(outgoing[0][i], kind, share) for i, (kind, _) in enumerate(tensors)] for share in self.shares
        ]
        arrived = _swap(self.members, outgoing, likes)
        return [
            self._together(kind, parts) for (kind, _), parts in zip(tensors, zip(*arrived, strict=True), strict=True)
        ]

    def _together(self, kind: str, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if kind == QUERIES or sum(share.key_count for share in self.shares) == self.shares[-1].keys.stop:
            return torch.cat(parts, 1)
        batch, _, *rest = parts[0].shape
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        total = parts[0].new_zeros((batch, self.shares[-1].keys.stop, *rest), dtype=dtype)
        for share, part in zip(self.shares, parts, strict=True):
            total[:, share.keys] += part
        return total.to(parts[0].dtype)


def _heads(x: torch.Tensor, kind: str, share: Share) -> torch.Tensor:
    if kind == ROWS:
        return x
    return x[:, share.queries if kind == QUERIES else share.keys]


def _resized(x: torch.Tensor, kind: str, share: Share) -> torch.Tensor:
    """Something of x's shape and dtype with that share's number of heads."""
    heads = share.query_count if kind == QUERIES else share.key_count
    return x[:, :1].expand(x.shape[0], heads, *x.shape[2:])


def _swap(
    members: Members, outgoing: list[list[torch.Tensor]], likes: list[list[torch.Tensor]]
) -> list[list[torch.Tensor]]:
    """Send outgoing[i] to member i; returns what each member sent, of the shapes and dtypes of likes[i]."""
    device = outgoing[0][0].device
    send_sizes, receive_sizes = ([sum(map(_nbytes, group)) for group in groups] for groups in (outgoing, likes))
    sent = torch.empty(sum(send_sizes), dtype=torch.uint8, device=device)
    received = torch.empty(sum(receive_sizes), dtype=torch.uint8, device=device)
    for views, tensors in zip(_views(sent, outgoing), outgoing, strict=True):
        for view, x in zip(views, tensors, strict=True):
            view.copy_(x)
    members.swap(sent, send_sizes, received, receive_sizes)
    return _views(received, likes)


def _nbytes(x: torch.Tensor) -> int:
    """Bytes of x in a message, rounded up to where the next may begin."""
    return -(-x.numel() * x.element_size() // _ALIGNMENT) * _ALIGNMENT


def _views(buffer: torch.Tensor, groups: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """The buffer as tensors of the groups' shapes and dtypes, one after the other."""
    offset, result = 0, []
    for group in groups:
        views = []
        for x in group:
            piece = buffer[offset : offset + x.numel() * x.element_size()]
            views.append(piece.view(x.dtype).view(x.shape))
            offset += _nbytes(x)
        result.append(views)
    return result

"""shard, unshard, positions: convert between a whole sequence and one rank's shard of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from longctx.errors import LayoutError
from longctx.layout import Layout, Span, get_layout
from longctx.mesh import Mesh


def local_spans(length: int, mesh: Mesh, layout: str | Layout = "zigzag") -> tuple[Span, ...]:
    """Return the global indices of this rank's tokens in a sequence of ``length`` tokens, padding included."""
    layout = get_layout(layout)
    padded = layout.padded_length(length, mesh.ring_size, mesh.ulysses_size)
    return layout.member_spans(mesh.ring_rank, mesh.ring_size, mesh.ulysses_rank, mesh.ulysses_size, padded)


def positions(length: int, mesh: Mesh, layout: str | Layout = "zigzag") -> torch.Tensor:
    """Return the global indices of this rank's tokens.

    Args:
        length: tokens of the whole sequence; padding gets the indices ``length, length + 1, …``.

    Returns:
        (T,) int64, in local order; T is the same on every rank.
    """
    return _indices(local_spans(length, mesh, layout))


def shard(
    x: torch.Tensor,
    mesh: Mesh,
    dim: int = 1,
    layout: str | Layout = "zigzag",
    pad_value: float | int | bool | None = None,
) -> torch.Tensor:
    """Return this rank's shard of ``x``, which every rank of the sequence group holds whole.

    The sequence is padded on the right with ``pad_value`` to a multiple of 2·ring·ulysses (zigzag) or ring·ulysses,
    so every rank gets the same T. No communication; a model that ``attach`` has bound to the mesh verifies in forward
    that all ranks of the group passed the same integer tensors. Differentiable: backward returns the gradient of this
    rank's tokens, zero elsewhere.

    Args:
        x: any shape; ``x.shape[dim]`` is the global length S.
        pad_value: default 0, or −100 for int64 tensors that contain −100 (labels).

    Returns:
        ``x``'s shape with S replaced by T = padded(S) / (ring·ulysses), contiguous.

    Raises:
        LayoutError: ``dim`` does not exist or the sequence is empty.
    """
    _check_dim(x, dim)
    if mesh.sequence_size > 1 and x.dim() > 1 and x.dtype in (torch.int64, torch.int32):
        mesh.cut.add(x)
    return cut(x, mesh, dim, layout, pad_value)


def cut(
    x: torch.Tensor,
    mesh: Mesh,
    dim: int = 1,
    layout: str | Layout = "zigzag",
    pad_value: float | int | bool | None = None,
) -> torch.Tensor:
    """Return the same as ``shard``, without recording ``x`` for the comparison in forward."""
    dim %= x.dim()
    length = x.shape[dim]
    pieces: list[torch.Tensor] = []
    padded = mesh.sequence_size > 1 and length % get_layout(layout).multiple(mesh.ring_size, mesh.ulysses_size)
    if pad_value is None:
        pad_value = -100 if padded and x.dtype == torch.int64 and bool((x == -100).any()) else 0
    for span in local_spans(length, mesh, layout):
        count = min(max(-(-(length - span.start) // span.stride), 0), span.count)  # tokens before the padding
        if count:
            end = span.start + (count - 1) * span.stride + 1
            pieces.append(x[(slice(None),) * dim + (slice(span.start, end, span.stride),)])
        if span.count - count:
            shape = (*x.shape[:dim], span.count - count, *x.shape[dim + 1 :])
            pieces.append(x.new_full(shape, pad_value))
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0].contiguous()


def unshard(
    x: torch.Tensor, mesh: Mesh, dim: int = 1, *, length: int | None = None, layout: str | Layout = "zigzag"
) -> torch.Tensor:
    """Return the whole sequence on every rank of the sequence group, the inverse of ``shard``.

    Differentiable for a loss that every rank computes from the whole sequence: backward returns this rank's slice of
    the gradient, so the ranks' parameter gradients sum up to the true one. (Backward of a usual all-gather sums over
    ranks, and would make them ring·ulysses times too large.)

    Args:
        x: this rank's shard; the same shape on every rank of the group.
        length: the true global length S, to trim the padding; None keeps it.

    Returns:
        ``x``'s shape with T replaced by S.

    Raises:
        LayoutError: ``dim`` does not exist, or ``length`` does not match T local tokens.
    """
    _check_dim(x, dim)
    dim %= x.dim()
    layout = get_layout(layout)
    padded = x.shape[dim] * mesh.sequence_size
    if length is None:
        length = padded
    if layout.padded_length(length, mesh.ring_size, mesh.ulysses_size) != padded:
        raise LayoutError(
            f"unshard(length={length}): {mesh.sequence_size} ranks of {x.shape[dim]} tokens hold {padded}, and a "
            f"{layout.name} sequence of {length} tokens is padded to "
            f"{layout.padded_length(length, mesh.ring_size, mesh.ulysses_size)}; pass the length given to shard"
        )
    if mesh.sequence_size == 1:
        return x.narrow(dim, 0, length)
    return _Unshard.apply(x, mesh, dim, length, layout)


class _Unshard(torch.autograd.Function):
    """All-gather over the sequence group, in global order; backward takes this rank's slice."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Mesh, dim: int, length: int, layout: Layout) -> torch.Tensor:
        ctx.arguments = (mesh, dim, layout)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(mesh.sequence_size)]
        dist.all_gather(parts, x.contiguous(), group=mesh.sequence_group)
        padded = x.shape[dim] * mesh.sequence_size
        whole = x.new_empty((*x.shape[:dim], padded, *x.shape[dim + 1 :]))
        for member, part in enumerate(parts):
            ring_rank, ulysses_rank = divmod(member, mesh.ulysses_size)
            spans = layout.member_spans(ring_rank, mesh.ring_size, ulysses_rank, mesh.ulysses_size, padded)
            offset = 0
            for span in spans:
                index = (slice(None),) * dim + (slice(span.start, span.last + 1, span.stride),)
                whole[index] = part.narrow(dim, offset, span.count)
                offset += span.count
        return whole.narrow(dim, 0, length).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        mesh, dim, layout = ctx.arguments
        return cut(gradient, mesh, dim, layout, 0), None, None, None, None


def _indices(spans: tuple[Span, ...]) -> torch.Tensor:
    parts = [torch.arange(span.start, span.last + 1, span.stride, dtype=torch.int64) for span in spans]
    return torch.cat(parts)


def _check_dim(x: torch.Tensor, dim: int) -> None:
    if not -x.dim() <= dim < x.dim():
        raise LayoutError(f"dim={dim}: the tensor has shape {tuple(x.shape)}; name its sequence dimension")
    if x.shape[dim] < 1:
        raise LayoutError(f"dim={dim} of shape {tuple(x.shape)} is empty: a sequence needs at least one token")

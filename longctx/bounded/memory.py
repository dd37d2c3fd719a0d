"""A memory that travels over the chunks of a block, forwards as a state and backwards as its gradient.

    after_c = close_c (carry_c before_c + local_c)          before_{c+1} = after_c

Factors are (B, G, chunks, 1, M) or None (1), memories (B, G, M, D). Cottention's memory has no factors at all.
"""

from __future__ import annotations

import torch

from longctx.bounded.chunks import times


def forwards(
    memory: torch.Tensor,
    local: torch.Tensor,
    carry: torch.Tensor | None,
    close: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory before every chunk (B, G, chunks, M, D), and after the last; `local` (B, G, chunks, M, D)."""
    carried, closed = _column(_product(carry, kept)), _column(close)
    before = torch.empty_like(local)
    for chunk in range(local.shape[2]):
        before[:, :, chunk] = memory
        memory = times(memory, _at(carried, chunk)) + local[:, :, chunk]
        memory = times(memory, _at(closed, chunk))
    return before, memory


def backwards(
    gradient: torch.Tensor,
    local: torch.Tensor,
    carry: torch.Tensor | None,
    close: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of every chunk's carry before + local, (B, G, chunks, M, D), and of the memory before the first.

    `gradient` is that of the memory after the last chunk; `local` what the reads of each chunk add to the gradient of
    carry * before.
    """
    closed, carried, keep = _column(close), _column(carry), _column(kept)
    inside = torch.empty_like(local)
    for chunk in reversed(range(local.shape[2])):
        gradient = times(gradient, _at(closed, chunk))
        inside[:, :, chunk] = gradient
        gradient = times(gradient, _at(keep, chunk)) + local[:, :, chunk]
        gradient = times(gradient, _at(carried, chunk))
    return inside, gradient


def _product(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else times(a, b)


def _column(factor: torch.Tensor | None) -> torch.Tensor | None:
    return None if factor is None else factor.transpose(-1, -2)


def _at(factor: torch.Tensor | None, chunk: int) -> torch.Tensor | None:
    return None if factor is None else factor[:, :, chunk]

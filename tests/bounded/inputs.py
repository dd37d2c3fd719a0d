"""Random inputs in fp64 that the tests of ABC and Cottention share."""

from __future__ import annotations

import torch
from bounded import direct

PACKED = direct.packed([[(-1, 3), (4, 17), (5, 10), (-1, 7)], [(2, 1), (3, 8), (-1, 3), (7, 25)]])
"""Documents of 37 tokens in two rows, with padding around and within them."""
Inputs = tuple[list[torch.Tensor], torch.Tensor, torch.Generator]


def qkv(
    batch: int = 2, heads: int = 4, groups: int = 2, length: int = 37, width: int = 5, out: int = 3, seed: int = 0
) -> Inputs:
    """Return ([q, k, v], a weight for the output, a generator); all but the weight require a gradient."""
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, length, width), (batch, groups, length, width), (batch, groups, length, out)
    return [leaf(g, *shape) for shape in shapes], leaf(g, batch, heads, length, out).detach(), g


def leaf(g: torch.Generator, *shape: int, spread: float = 1.0) -> torch.Tensor:
    return (spread * torch.randn(shape, generator=g, dtype=torch.float64)).requires_grad_()


def of_abc(slots: int = 4, spread: float = 1.0, **sizes: int) -> Inputs:
    """As `qkv`, with the control logits of keys and of values."""
    leaves, weight, g = qkv(**sizes)
    shape = (*leaves[1].shape[:3], slots)
    return [*leaves, *(leaf(g, *shape, spread=spread) for _ in range(2))], weight, g


def of_cosine(**sizes: int) -> Inputs:
    """As `qkv`, with the exponent of each query head before the sigmoid."""
    leaves, weight, g = qkv(**sizes)
    return [*leaves, leaf(g, leaves[0].shape[1])], weight, g

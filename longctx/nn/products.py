"""A product that is added to its sum at once, as the gradient of a weight over tiles is."""

from __future__ import annotations

import torch

_ROWS = 4096  # of a sum that are added to at a time where it has another dtype than the factors


def add_product(total: torch.Tensor, dout: torch.Tensor, x: torch.Tensor) -> None:
    """total (V, D) += dout (n, V)ᵀ x (n, D), without a second whole matrix where the sum is the wider."""
    if total.dtype == x.dtype:
        total.addmm_(dout.T, x)
        return
    for rows, columns in zip(total.split(_ROWS), dout.split(_ROWS, 1), strict=True):
        rows += columns.T @ x

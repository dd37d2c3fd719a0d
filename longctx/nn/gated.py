"""Backward of a gated MLP, down(act(gate(x)) · up(x)), written out: at most four inner widths of a tile are allocated.

Autograd peaks at six, plus the whole gradient of one weight. Here each inner result's buffer is reused for the
gradient that replaces it, all tiles share the buffers, and products accumulate directly into the weights' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longctx.nn.linear import add_product

Total = torch.Tensor | None


@dataclass(frozen=True)
class Gated:
    """A gated MLP of three linears, with or without biases.

    Attributes:
        gate, up: (D) -> (F); down: (F) -> (E).
        act: the activation.
        act_backward: (dout, x, out) writes the gradient of act's input into out, which may be dout itself.
    """

    gate: torch.nn.Linear
    up: torch.nn.Linear
    down: torch.nn.Linear
    act: Callable[[torch.Tensor], torch.Tensor]
    act_backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]

    def gradients(
        self, x: torch.Tensor, dout: torch.Tensor, tile: int, parameters: Sequence[torch.Tensor], of_x: bool
    ) -> tuple[Total, list[Total]]:
        """Return the gradients of x and, in fp32 (fp64 for fp64), of ``parameters``.

        Args:
            x: (N, D).
            dout: (N, E).
            tile: tokens per tile.
            of_x: whether x needs one; None is returned if not.
        """
        x, dout = x.detach(), dout.detach()
        totals = {id(p): torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters}
        dx = torch.empty_like(x) if of_x else None
        inner = self.gate.weight.new_empty(3, min(tile, x.shape[0]), self.gate.weight.shape[0])
        with torch.no_grad():
            for first in range(0, x.shape[0], tile):
                part = slice(first, first + tile)
                self._tile(x[part], dout[part], totals, None if dx is None else dx[part], inner)
        return dx, [totals[id(parameter)] for parameter in parameters]

    def _tile(
        self, x: torch.Tensor, dout: torch.Tensor, totals: dict[int, torch.Tensor], dx: Total, inner: torch.Tensor
    ) -> None:
        gate, up, product = inner[:, : x.shape[0]]  # three shared buffers, and `activated`
        _linear(x, self.gate, gate)
        _linear(x, self.up, up)
        activated = self.act(gate)
        torch.mul(activated, up, out=product)
        _add(totals, self.down, dout, product)
        dproduct = torch.mm(dout, self.down.weight, out=product)
        dgate = torch.mul(dproduct, up, out=up)
        dup = dproduct.mul_(activated)
        del activated
        self.act_backward(dgate, gate, dgate)
        _add(totals, self.gate, dgate, x)
        _add(totals, self.up, dup, x)
        if dx is not None:
            torch.mm(dgate, self.gate.weight, out=dx)
            dx.addmm_(dup, self.up.weight)


def _linear(x: torch.Tensor, linear: torch.nn.Linear, out: torch.Tensor) -> None:
    if linear.bias is None:
        torch.mm(x, linear.weight.T, out=out)
    else:
        torch.addmm(linear.bias, x, linear.weight.T, out=out)


def _add(totals: dict[int, torch.Tensor], linear: torch.nn.Linear, dout: torch.Tensor, x: torch.Tensor) -> None:
    """Add a tile's gradients of a linear's weight and bias."""
    if id(linear.weight) in totals:
        add_product(totals[id(linear.weight)], dout, x)
    if linear.bias is not None and id(linear.bias) in totals:
        total = totals[id(linear.bias)]
        total += dout.sum(0, dtype=total.dtype)

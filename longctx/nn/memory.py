"""ABCMemory and CosineMemory: what a bounded layer adds to queries, keys and values, and nothing of projections.

A memory owns the few parameters that the method brings (ABC's control, Cottention's exponent) and calls the operator.
`longctx.nn.attention` puts projections around it; `longctx.convert` hangs it onto a layer of a transformers model,
whose own projections, rotary positions and norms stay as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from longctx.attention.arguments import GOLDEN
from longctx.bounded.abc import control as controls
from longctx.bounded.abc.operator import abc_attention
from longctx.bounded.cosine.operator import cosine_attention
from longctx.errors import ModelError
from longctx.nn.kinds import ABC, Cosine, Kind, Ring, Window
from longctx.nn.window import WindowMemory


def make_memory(
    kind: Kind,
    *,
    hidden_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    max_length: int | None = None,
    place: int = 0,
) -> torch.nn.Module | None:
    """Return the module that a layer of this kind needs; None for ``Ring``, which needs nothing.

    Args:
        max_length: the model's longest sequence, for a linformer control that names none.
        place: number of the layer; random controls of two layers differ.
    """
    if isinstance(kind, Ring):
        return None
    if isinstance(kind, Window):
        return WindowMemory(kind)
    if isinstance(kind, Cosine):
        return CosineMemory(kind, heads)
    return ABCMemory(kind, hidden_size, kv_heads, head_dim, max_length=max_length, place=place)


class ABCMemory(torch.nn.Module):
    """The control of one ABC layer: which tokens its slots keep.

    Args:
        kind: slots, control and normaliser.
        hidden_size: width of the layer's input, which the control ``mlp`` reads (with ``control_input="x"``).
        kv_heads: G, heads that have a memory of their own.
        head_dim: D of keys and values, read by ``control_input="kv"``.
        max_length: longest sequence of a ``linformer`` control.
        place: number of the layer.
    """

    exact = False

    def __init__(
        self,
        kind: ABC,
        hidden_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        max_length: int | None = None,
        place: int = 0,
    ) -> None:
        super().__init__()
        self.kind, self.kv_heads, self.place = kind, kv_heads, place
        self.initial_std = 0.0  # of the first weights: it gives logits of size one for inputs of size one
        own = kv_heads if kind.per_head else 1
        self.key_control: torch.nn.Parameter | None = None
        self.value_control: torch.nn.Parameter | None = None
        if kind.control == "mlp":
            width = hidden_size if kind.control_input == "x" else head_dim
            self.key_control = torch.nn.Parameter(torch.empty(own, kind.slots, width))
            if not kind.tied:
                self.value_control = torch.nn.Parameter(torch.empty(own, kind.slots, width))
        elif kind.control == "linformer":
            length = kind.max_length or max_length
            if length is None:
                raise ModelError("abc: the control linformer has a weight for every position; give max_length")
            self.key_control = torch.nn.Parameter(torch.empty(own, kind.slots, length))
        if self.key_control is not None:
            self.initial_std = 1 / math.sqrt(self.key_control.shape[-1])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the control's weights."""
        for weight in (self.key_control, self.value_control):
            if weight is not None:
                torch.nn.init.normal_(weight, std=self.initial_std)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        inputs: torch.Tensor | None = None,
        *,
        causal: bool = True,
        scale: float | None = None,
        **where: Any,
    ) -> Any:
        """Attend to the slots.

        Args:
            query: (B, H, T, D).
            key: (B, G, T, D), rotated if the model rotates.
            value: (B, G, T, Dv).
            inputs: (B, T, hidden), the layer's input, for ``control_input="x"``.
            where: mesh, layout, document_ids, length, state, return_state, backend of ``abc_attention``.

        Returns:
            (B, H, T, Dv), with the state behind it if ``return_state``.
        """
        normalizer = self.kind.normalizer or ("prefix" if causal else "global")
        control = self.control(key, value, inputs)
        return abc_attention(query, key, value, control, causal=causal, normalizer=normalizer, scale=scale, **where)

    def control(self, key: torch.Tensor, value: torch.Tensor, inputs: torch.Tensor | None) -> Any:
        """Return what ``abc_attention`` takes as control: logits (B, G, T, M), a pair of them, or a ``Control``."""
        kind = self.kind
        if kind.control == "mlp":
            assert self.key_control is not None
            first = self._logits(self.key_control, key, inputs)
            if self.value_control is None:
                return first
            return first, self._logits(self.value_control, value, inputs)
        if kind.control == "linformer":
            assert self.key_control is not None
            return controls.linformer(self.key_control)
        if kind.control == "random":
            return controls.random(kind.slots, (kind.seed + self.place * GOLDEN) % 2**63)
        if kind.control == "identity":
            return controls.identity()
        rated = {"dilated": controls.dilated, "compressive": controls.compressive}
        if kind.control in rated:
            return rated[kind.control](kind.slots, kind.rate)
        return {"cluster": controls.cluster, "window": controls.window}[kind.control](kind.slots)

    def _logits(self, weight: torch.Tensor, tokens: torch.Tensor, inputs: torch.Tensor | None) -> torch.Tensor:
        """Return (B, G, T, M) logits from the layer's input, or from this head's keys or values."""
        if self.kind.control_input == "kv":
            return (tokens @ weight.to(tokens.dtype).transpose(-1, -2)).expand(*tokens.shape[:3], -1)
        if inputs is None:
            raise ModelError("abc: control_input 'x' reads the layer's input, and none was given")
        own, slots, width = weight.shape
        logits = F.linear(inputs, weight.reshape(own * slots, width)).unflatten(-1, (own, slots)).transpose(1, 2)
        return logits.expand(-1, self.kv_heads, -1, -1)

    def extra_repr(self) -> str:
        """Show the kind."""
        return repr(self.kind)


class CosineMemory(torch.nn.Module):
    """Cottention's learned exponent: the sum of n tokens is divided by n ** sigmoid(exponent), a number a head."""

    exact = False

    def __init__(self, kind: Cosine, heads: int) -> None:
        super().__init__()
        self.kind = kind
        self.exponent = torch.nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start where the paper does."""
        torch.nn.init.constant_(self.exponent, self.kind.exponent)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        inputs: torch.Tensor | None = None,
        *,
        causal: bool = True,
        scale: float | None = None,
        **where: Any,
    ) -> Any:
        """Attend as ``ABCMemory.forward`` does; ``scale`` and ``inputs`` mean nothing to a cosine."""
        return cosine_attention(query, key, value, self.exponent, causal=causal, scale_on=self.kind.scale_on, **where)

    def extra_repr(self) -> str:
        """Show the kind."""
        return repr(self.kind)

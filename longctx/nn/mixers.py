"""Token mixers of bounded layers, without projections: ABCMixer and CosineMixer.

A mixer owns the parameters that its method adds (ABC's control, Cottention's exponent) and calls the operator.
`longctx.nn.attention` adds projections; `longctx.convert` attaches a mixer to a layer of a transformers model, whose
own projections, rotary positions and norms stay as they are.
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
from longctx.nn.window import WindowMixer


def make_mixer(
    kind: Kind,
    *,
    hidden_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    max_length: int | None = None,
    layer_index: int = 0,
) -> torch.nn.Module | None:
    """Return the mixer of a layer of this kind; None for ``Ring``, which needs no module.

    Args:
        max_length: the model's longest sequence, for a linformer control without its own.
        layer_index: number of the layer; random controls differ between layers.
    """
    if isinstance(kind, Ring):
        return None
    if isinstance(kind, Window):
        return WindowMixer(kind)
    if isinstance(kind, Cosine):
        return CosineMixer(kind, heads)
    return ABCMixer(kind, hidden_size, kv_heads, head_dim, max_length=max_length, layer_index=layer_index)


class ABCMixer(torch.nn.Module):
    """ABC with a layer's control, which decides the slots that tokens are written to.

    Args:
        kind: slots, control and normaliser.
        hidden_size: width of the layer's input, which the control ``mlp`` reads (with ``control_input="x"``).
        kv_heads: G, the heads; each has its own state.
        head_dim: D of keys and values, read by ``control_input="kv"``.
        max_length: longest sequence of a ``linformer`` control.
        layer_index: number of the layer.
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
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        self.kind, self.kv_heads, self.layer_index = kind, kv_heads, layer_index
        self.initial_std = 0.0  # of the initial weights; set so that inputs of unit size give logits of unit size
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
        """Initialise the control's weights."""
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
            key: (B, G, T, D), with any rotary embedding applied.
            value: (B, G, T, Dv).
            inputs: (B, T, hidden), the layer's input, for ``control_input="x"``.
            where: mesh, layout, document_ids, length, state, return_state, backend of ``abc_attention``.

        Returns:
            (B, H, T, Dv); with ``return_state`` also the state.
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
            return controls.random(kind.slots, (kind.seed + self.layer_index * GOLDEN) % 2**63)
        if kind.control == "identity":
            return controls.identity()
        if kind.control == "dilated":
            return controls.dilated(kind.slots, rate=kind.rate)
        if kind.control == "compressive":
            return controls.compressive(kind.slots, ratio=kind.rate)
        return {"cluster": controls.cluster, "window": controls.window}[kind.control](kind.slots)

    def _logits(self, weight: torch.Tensor, tokens: torch.Tensor, inputs: torch.Tensor | None) -> torch.Tensor:
        """Return (B, G, T, M) logits from the layer's input, or from this head's keys or values."""
        if self.kind.control_input == "kv":
            return (tokens @ weight.to(tokens.dtype).transpose(-1, -2)).expand(*tokens.shape[:3], -1)
        if inputs is None:
            raise ModelError("abc: control_input 'x' reads the layer's input; pass inputs")
        own, slots, width = weight.shape
        logits = F.linear(inputs, weight.reshape(own * slots, width)).unflatten(-1, (own, slots)).transpose(1, 2)
        return logits.expand(-1, self.kv_heads, -1, -1)

    def extra_repr(self) -> str:
        """Show the kind."""
        return repr(self.kind)


class CosineMixer(torch.nn.Module):
    """Cottention with its learned exponent per head: the sum over n tokens is divided by n ** sigmoid(exponent)."""

    exact = False

    def __init__(self, kind: Cosine, heads: int) -> None:
        super().__init__()
        self.kind = kind
        self.exponent = torch.nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial exponent, the paper's by default."""
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
        """Attend as ``ABCMixer.forward`` does; ``scale`` and ``inputs`` are ignored."""
        return cosine_attention(query, key, value, self.exponent, causal=causal, scale_on=self.kind.scale_on, **where)

    def extra_repr(self) -> str:
        """Show the kind."""
        return repr(self.kind)


ABCMemory, CosineMemory, make_memory = ABCMixer, CosineMixer, make_mixer  # former names

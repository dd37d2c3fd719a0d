"""Whole attention layers with a bounded state: input projections, a mixer (`mixers.py`), an output projection."""

from __future__ import annotations

from typing import Any

import torch

from longctx.errors import ModelError
from longctx.nn.kinds import ABC, Cosine, read_kind
from longctx.nn.mixers import ABCMixer, CosineMixer


class BoundedAttention(torch.nn.Module):
    """Project the input to queries, keys and values, mix tokens through a bounded state, and project the output.

    Args:
        hidden_size: width of input and output.
        heads: H query heads.
        kv_heads: G key/value heads, each with its own state; G divides H; default H.
        head_dim: D; default hidden_size / heads.
        bias: of the four projections.
        causal: a token reads itself and earlier tokens; if False, all of them.
    """

    memory: torch.nn.Module  # the mixer; its name is part of parameter names in checkpoints

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ModelError(f"kv_heads={kv_heads} must divide heads={heads}")
        if head_dim is None and hidden_size % heads:
            raise ModelError(f"hidden_size={hidden_size} is not a multiple of heads={heads}; give head_dim")
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        self.head_dim = hidden_size // heads if head_dim is None else head_dim
        self.q_proj = torch.nn.Linear(hidden_size, heads * self.head_dim, bias=bias)
        self.k_proj = torch.nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = torch.nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = torch.nn.Linear(heads * self.head_dim, hidden_size, bias=bias)

    def forward(
        self,
        inputs: torch.Tensor,
        *,
        context: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        state: Any = None,
        return_state: bool = False,
        **where: Any,
    ) -> Any:
        """Attend.

        Args:
            inputs: (B, T, hidden).
            context: (B, S, hidden) to attend to instead of ``inputs`` (cross-attention, with ``causal=False``).
            position_embeddings: cosines and sines (B or 1, T, D) from a model's rotary module; queries and keys are
                rotated by them.
            state: the state that an earlier call returned, to continue from.
            return_state: return ``(output, state)``.
            where: mesh, layout, document_ids, length, backend of the operator.

        Returns:
            (B, T, hidden); with ``return_state`` also the state.

        Raises:
            AttentionError: the arguments do not fit together.
        """
        source = inputs if context is None else context
        query = self._heads(self.q_proj(inputs))
        key, value = self._heads(self.k_proj(source)), self._heads(self.v_proj(source))
        if position_embeddings is not None:
            query, key = (rotate(x, *position_embeddings) for x in (query, key))
        result = self.memory(
            query, key, value, source, causal=self.causal, state=state, return_state=return_state, **where
        )
        out, after = result if return_state else (result, None)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return (out, after) if return_state else out

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class ABCAttention(BoundedAttention):
    """Attention with bounded-memory control (ABC, Peng et al. 2022): M slots instead of all past tokens.

    Args:
        slots: M.
        control: decides which slots a token is written to: mlp, linformer, random, cluster, window, dilated,
            compressive, identity.
        options: other options of ``longctx.nn.kinds.ABC`` (normalizer, control_input, per_head, tied, rate, max_length,
            seed), and ``bias``, ``causal`` of the layer.

    The other arguments are ``BoundedAttention``'s.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        slots: int = 64,
        control: str = "mlp",
        bias: bool = False,
        causal: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, heads, kv_heads, head_dim, bias=bias, causal=causal)
        kind = read_kind({"abc": {"slots": slots, "control": control, **options}}, "ABCAttention")
        assert isinstance(kind, ABC)
        self.memory = ABCMixer(kind, hidden_size, self.kv_heads, self.head_dim)


class CosineAttention(BoundedAttention):
    """Cottention (Mongaras et al. 2024): cosine similarity, a D × D state and a learned exponent per head.

    Args:
        options: ``scale_on`` and ``exponent`` of ``longctx.nn.kinds.Cosine``, ``bias`` and ``causal`` of the layer.

    The other arguments are ``BoundedAttention``'s.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        causal: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, heads, kv_heads, head_dim, bias=bias, causal=causal)
        kind = read_kind({"cosine": options}, "CosineAttention")
        assert isinstance(kind, Cosine)
        self.memory = CosineMixer(kind, heads)


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Return x (B, H, T, D) rotated by angles given as (B or 1, T, D), halves of a head paired as in Llama."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines[:, None] + torch.cat((-second, first), dim=-1) * sines[:, None]

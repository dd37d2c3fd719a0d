"""Seeds of attention dropout: one per batch row and layer.

The dropout mask is a function of (seed, head, query, key), so the ranks of a sequence only need equal seeds. They are
passed as the forward keyword ``dropout_seeds``, like ``document_ids``, so a checkpoint that recomputes a layer uses the
same ones. ``longctx.Engine`` adds the keyword; every layer derives its own seeds from its index in the model.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from longctx.attention.arguments import GOLDEN, wrapped
from longctx.errors import ModelError
from longctx.models.hook.binding import binding_of, module_index

_NAMES = re.compile("att.*drop|drop.*att")  # attention_dropout, attn_pdrop, attention_probs_dropout_prob, …


def drops_attention(config: Any) -> bool:
    """Return whether a transformers config sets attention dropout."""
    values = (value for name, value in config.to_dict().items() if _NAMES.search(name))
    return any(isinstance(value, int | float) and value > 0 for value in values)


def layer_seeds(module: torch.nn.Module, query: torch.Tensor, seeds: torch.Tensor | None) -> torch.Tensor:
    """Return (B,) int64 seeds of this layer.

    Args:
        query: (B, H, T, D).
        seeds: (B,) int64 as passed to the model, equal on all ranks of the sequence; None, on one device only, draws
            them from torch's generator, which a checkpoint restores before it recomputes.

    Raises:
        ModelError: no seeds on a shard, or of another shape.
    """
    name, batch = type(module).__name__, query.shape[0]
    if seeds is None:
        binding = binding_of(module)
        if binding is not None and binding.sharded:
            raise ModelError(
                f"{name} trains with attention dropout on a shard without dropout_seeds: pass the keyword "
                "dropout_seeds=(B,) int64 to the model, equal on all ranks of the sequence and new in every step "
                "(longctx.Engine does it), or set attention_dropout (GPT-2: attn_pdrop, BERT: "
                "attention_probs_dropout_prob) to 0 in the model's config"
            )
        return torch.randint(-(2**63), 2**63 - 1, (batch,), device=query.device)
    if tuple(seeds.shape) != (batch,) or seeds.dtype != torch.int64:
        raise ModelError(f"dropout_seeds {tuple(seeds.shape)} of {seeds.dtype}: {name} needs ({batch},) int64")
    return seeds.to(query.device) + wrapped(module_index(module) * GOLDEN)

"""Tiny models, packed rows and the unsharded eager truth that the tests of longctx.models share."""

from __future__ import annotations

import copy
from typing import Any

import torch

from longctx.models.load.scratch import make_config
from longctx.models.register import register

WINDOW = 10
VOCABULARY = 64

# name -> (architecture, further config keys); every window is smaller than the sequences of the tests
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen3": ("qwen3", {}),
    "qwen3-window": (
        "qwen3",
        {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "gemma": ("gemma", {}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "attn_logit_softcapping": 0.5,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": ("gpt2", {}),
    "phi": ("phi", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "gpt-oss": (
        "gpt_oss",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
}


def tiny_config(name: str, **extra: Any) -> Any:
    """Return the config of a tiny model of the zoo ("bert" included)."""
    if name == "bert":
        from transformers import BertConfig

        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=None)
        return BertConfig(vocab_size=VOCABULARY, max_position_embeddings=256, **sizes, **quiet, **extra)
    architecture, more = CAUSAL.get(name, (name, {}))
    return make_config(
        architecture, hidden_size=32, layers=2, heads=4, kv_heads=None if architecture == "gpt2" else 2,
        intermediate_size=64, vocab_size=VOCABULARY, max_positions=256, extra={**more, **extra},
    )  # fmt: skip


def tiny_model(config: Any, implementation: str, seed: int = 0) -> Any:
    """Return a model with the same random weights for every implementation."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    family = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    register()
    torch.manual_seed(seed)
    experts = {"experts_implementation": "eager"} if config.model_type == "gpt_oss" else {}  # torch's knows no fp64
    model = family.from_config(copy.deepcopy(config), attn_implementation=implementation, **experts)
    with torch.no_grad():  # norms that start at one and biases that start at zero would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def documents(kind: str, batch: int, length: int) -> torch.Tensor:
    """Return (B, S) document ids: "whole" rows, "packed" rows, or "left"-padded ones (-1)."""
    ids = torch.zeros(batch, length, dtype=torch.int32)
    for row in range(batch):
        if kind == "packed":  # borders that fall inside chunks, at odd places, different in every row
            for border in (length // 5 + row, length // 2 + 1, length - 3 - row):
                ids[row, border:] += 1
        elif kind == "left":
            ids[row, : 4 + 3 * row] = -1
    return ids


def positions_of(document_ids: torch.Tensor) -> torch.Tensor:
    """Return (B, S) positions that start again with every document; 0 at padding."""
    positions = torch.zeros_like(document_ids, dtype=torch.int64)
    for row in range(document_ids.shape[0]):
        for document in document_ids[row].unique():
            inside = document_ids[row] == document
            if document >= 0:
                positions[row, inside] = torch.arange(int(inside.sum()))
    return positions


def eager_mask(config: Any, document_ids: torch.Tensor, dtype: torch.dtype) -> Any:
    """Return the block-diagonal 4D mask (per layer type where the model takes a dict) of the eager truth."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    same &= (document_ids >= 0)[:, None, None, :]
    distance = torch.arange(document_ids.shape[1])[:, None] - torch.arange(document_ids.shape[1])
    if config.model_type != "bert":
        same = same & (distance >= 0)
    window = getattr(config, "sliding_window", None)
    full, near = (_additive(allowed, dtype) for allowed in (same, same & (distance < (window or 10**9))))
    if getattr(config, "layer_types", None):
        return {"full_attention": full, "sliding_attention": near}
    return near if window else full


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # softmax is fp32 inside, and a row of padding that is -inf everywhere would be NaN
    return torch.zeros((), dtype=dtype).masked_fill(~allowed, torch.finfo(torch.float32).min)

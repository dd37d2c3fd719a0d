"""Tiny models with layers of several kinds, and the slow truth beside them, for the tests of converted models."""

from __future__ import annotations

from typing import Any

import torch
from models.zoo import tiny_config, tiny_model

from longctx.models.convert import convert

ALL = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
SLOTS = {"slots": 5}
MIXED: dict[str, Any] = {"0": {"abc": SLOTS}, "1": "cosine"}
HYBRID: dict[str, Any] = {"0": {"abc": SLOTS}, "2": {"window": 6}, "3": "cosine"}  # layer 1 stays exact


def mixed_model(name: str, layers: dict[str, Any], count: int = 2, seed: int = 0, **extra: Any) -> Any:
    """Return a tiny converted model in fp64, in eval mode, with the same random weights every time."""
    if name == "bert":
        extra = {"num_hidden_layers": count, **extra}
        config = tiny_config(name)
        config.num_hidden_layers = count
    else:
        config = tiny_config(name, **extra)
        config.num_hidden_layers = count
        if getattr(config, "layer_types", None):
            config.layer_types = (list(config.layer_types) * count)[:count]
    model = convert(tiny_model(config, "longctx", seed), layers)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".memory." in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return (B, S) token ids that are no special token."""
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))

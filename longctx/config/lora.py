"""How many weights a run with `model.lora` trains, from the headers of its folder."""

from __future__ import annotations

import re

from longctx.config.lora_rules import ALL_LINEAR
from longctx.config.schema import RunConfig
from longctx.errors import ModelError
from longctx.models.load.headers import Weight, read_weights

_ENDS = re.compile(r"(?:^|\.)(embed_tokens|wte|wpe|word_embeddings|embed_in|tok_embeddings|lm_head|embed_out)$")


def trained_parameters(config: RunConfig) -> int | None:
    """Return the number of trained weights of a run with `model.lora`; None without it, or if its folder is unreadable.

    An adapter of rank r beside a matrix (m, n) has r (m + n) weights.
    """
    lora, folder = config.model.lora, config.model.pretrained
    if lora is None or folder is None:
        return None
    try:
        weights = read_weights(folder)
    except ModelError:
        return None  # said of model.pretrained
    total = 0
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if _named(module, lora.modules_to_save):
            total += weight.numbers
        elif len(weight.shape) == 2 and _is_target(module, weight, lora.targets):
            total += lora.rank * sum(weight.shape)
    return total


def _is_target(module: str, weight: Weight, targets: tuple[str, ...]) -> bool:
    return not _ENDS.search(module) if targets == (ALL_LINEAR,) else _named(module, targets)


def _named(module: str, ends: tuple[str, ...]) -> bool:
    return any(module == end or module.endswith(f".{end}") for end in ends)

"""How many positions a model has, where it looks them up in a table instead of turning or biasing by them."""

from __future__ import annotations

from torch import nn

_TABLES = ("wpe", "embed_positions", "position_embeddings")  # GPT-2; OPT, BART and kin; BERT


def table_of_positions(model: nn.Module) -> int | None:
    """Return how many tokens a row may have at most, or None where positions come from no table (RoPE, ALiBi, T5)."""
    rows = [
        module.num_embeddings - int(getattr(module, "offset", 0))  # OPT and BART leave the first rows to padding
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES
    ]
    return min(rows, default=None)

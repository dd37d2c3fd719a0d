"""How a model counts positions if it gets no position_ids, and how many it has if they are rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from longctx.errors import ModelError

_TABLES = ("wpe", "embed_positions", "position_embeddings")  # GPT-2; OPT, BART and kin; BERT


def table_of_positions(model: nn.Module) -> int | None:
    """Return the maximum number of tokens per row, or None if positions are not embeddings (RoPE, ALiBi, T5)."""
    rows = [
        module.num_embeddings - int(getattr(module, "offset", 0))  # OPT and BART reserve the first rows for padding
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES
    ]
    return min(rows, default=None)


@dataclass(frozen=True)
class PositionRule:
    """How a model counts positions without position_ids; measured by ``models.hook.position_probe``.

    Attributes:
        counts: which tokens before a token its position counts: all ("index", as Llama), those that are valid in the
            attention mask ("mask", as OPT), or those that are not the pad token ("tokens", as RoBERTa).
        first: position of a document's first token.
        pad_token: the token that "tokens" does not count.
    """

    counts: Literal["index", "mask", "tokens"] = "index"
    first: int = 0
    pad_token: int | None = None


PLAIN = PositionRule()


def count_positions(
    document_ids: torch.Tensor, rule: PositionRule, tokens: torch.Tensor | None, *, restart: bool
) -> torch.Tensor:
    """Return (B, S) int64 positions as the model itself would count them.

    Args:
        document_ids: (B, S), negative for padding.
        tokens: (B, S), needed for "tokens"; without them (embeddings) every token counts, as in transformers.
        restart: count from ``rule.first`` in every document; False counts along the whole row.
    """
    shape, device = document_ids.shape, document_ids.device
    index = torch.arange(shape[1], device=device).expand(shape)
    begin = _beginnings(document_ids) if restart else torch.zeros_like(index)
    if rule.counts == "index" or (rule.counts == "tokens" and tokens is None):
        return index - begin + rule.first
    counted = document_ids >= 0
    if rule.counts == "tokens" and tokens is not None:
        counted = tokens.ne(-1 if rule.pad_token is None else rule.pad_token)
    before = counted.cumsum(1) - counted.long()  # counted tokens to the left
    offset = before - before.gather(1, begin)
    return torch.where(counted, offset + rule.first, max(rule.first - 1, 0))


def _beginnings(document_ids: torch.Tensor) -> torch.Tensor:
    """Return (B, S) the index of the first token of each token's document; padding between documents starts its own."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    ids = _holes_filled(document_ids)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return index.masked_fill(~begins, 0).cummax(1).values


def _holes_filled(document_ids: torch.Tensor) -> torch.Tensor:
    """Return ids in which padding within a document has that document's id."""
    length = document_ids.shape[1]
    index = torch.arange(length, device=document_ids.device).expand(document_ids.shape)
    valid = document_ids >= 0
    left = torch.where(valid, index, 0).cummax(1).values
    right = torch.where(valid, index, length - 1).flip(1).cummin(1).values.flip(1)
    before, after = document_ids.gather(1, left), document_ids.gather(1, right)
    return torch.where(before == after, before, document_ids)


def check_positions(position_ids: torch.Tensor, document_ids: torch.Tensor, rule: PositionRule) -> None:
    """Check that position_ids are positions that the model uses for tokens.

    Args:
        position_ids, document_ids: (B, S); padding is ignored.

    Raises:
        ModelError: a position is smaller than the model's first one.
    """
    if rule.first and bool(((position_ids < rule.first) & (document_ids >= 0)).any()):
        raise ModelError(
            f"position_ids hold {int(position_ids[document_ids >= 0].min())}, but this model counts positions from "
            f"{rule.first} (smaller ones are for padding): add {rule.first} to them, or leave position_ids out and "
            "give document_ids"
        )

"""Compute document ids, positions and shifted labels of full rows before they are sharded. No communication.

None of the three can be recovered from a zigzag shard: a document may begin on another rank, and the label of a shard's
last token is another rank's first token.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.errors import EngineError
from longctx.models.hook.masks import documents_from_positions, separate_runs
from longctx.models.hook.positions import PLAIN, PositionRule, check_positions, count_positions

IGNORED = -100  # label of a token without loss; torch's and transformers' default
PADDING = -1  # document id of padding, which no token attends to
Batch = dict[str, Any]

_DOCUMENT_HINTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_REFUSED = {
    "past_key_values": "a training step keeps no cache; leave it out",
    "cache_position": "it describes a cache, and a sharded training step keeps none; leave it out",
}


def explicit_rows(batch: Batch, rule: PositionRule = PLAIN) -> Batch:
    """Return full rows with ``position_ids``, ``document_ids`` and (where there are labels) ``shift_labels``.

    A document is a run of equal ids; if an id reappears after another id, that is a new document with its own number.
    Padding does not end a document: tokens after a masked stretch still attend to those before it.

    Args:
        batch: ``input_ids`` (B, S) or ``inputs_embeds`` (B, S, D); optionally ``labels`` (B, S), unshifted as
            transformers takes them, or ``shift_labels`` (B, S), already shifted (masked language models); at most
            one description of documents: ``document_ids`` (B, S), negative for padding, or ``position_ids`` (B, S)
            that restart; ``attention_mask`` (B, S), 0 for padding anywhere. Other keys are kept.
        rule: how the model counts positions if the batch has none; see ``Engine.position_rule``.

    Returns:
        a new dictionary without ``labels`` and ``attention_mask``; ``document_ids`` (B, S) int32, −1 for padding;
        ``position_ids`` (B, S) int64; ``shift_labels`` (B, S) int64, −100 where a token has no target. Padding is
        replaced by another token of its row, see ``fill_padding``.

    Raises:
        EngineError: shapes differ, or a key cannot be sharded.
    """
    batch = {key: value for key, value in batch.items() if value is not None}
    for key, reason in _REFUSED.items():
        if key in batch:
            raise EngineError(f"batch key {key!r}: {reason}")
    rows, length = _shape(batch)
    batch.pop("use_cache", None), batch.pop("num_items_in_batch", None)
    mask = _matrix(batch.pop("attention_mask", None), "attention_mask", rows, length)
    positions = _matrix(batch.pop("position_ids", None), "position_ids", rows, length)
    documents = _matrix(batch.pop("document_ids", None), "document_ids", rows, length)
    labels = _matrix(batch.pop("labels", None), "labels", rows, length)
    shifted = _matrix(batch.pop("shift_labels", None), "shift_labels", rows, length)
    hints = [key for key in _DOCUMENT_HINTS if batch.pop(key, None) is not None]
    if hints and positions is None and documents is None:
        raise EngineError(
            f"batch keys {', '.join(hints)} describe packed documents in a form that cannot be sharded: give "
            "position_ids that restart at every document, or document_ids"
        )
    key = "input_ids" if "input_ids" in batch else "inputs_embeds"
    device = batch[key].device
    found = find_documents(rows, length, documents, positions, mask, device)
    batch["document_ids"] = found
    if positions is None:
        positions = count_positions(found, rule, batch.get("input_ids"), restart=documents is not None)
    else:
        check_positions(positions.to(device), found, rule)
    batch["position_ids"] = positions.to(device=device, dtype=torch.int64)
    batch[key] = fill_padding(batch[key], found)
    if shifted is not None:
        batch["shift_labels"] = shifted.to(device=device, dtype=torch.int64).masked_fill(found < 0, IGNORED)
    elif labels is not None:
        batch["shift_labels"] = shift_labels(labels.to(device), found)
    return batch


def find_documents(
    rows: int,
    length: int,
    document_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return (rows, length) int32 document ids, −1 for padding.

    Given ids are kept (negative ones become −1), unless an id reappears after another one in its row: then the row's
    runs are numbered. Without ids a document begins where a position is not the previous token's plus one, padding
    ignored; without positions either, a row is one document.
    """
    if attention_mask is not None and attention_mask.numel() and attention_mask.max() > 1:
        raise EngineError(
            f"attention_mask holds the value {attention_mask.max().item():g}: only 0 (padding) and 1 are allowed; give "
            "document numbers as document_ids"
        )
    valid = torch.ones(rows, length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        valid = attention_mask.to(device) > 0
    if document_ids is not None:
        documents = document_ids.to(device=device, dtype=torch.int32)
        return separate_runs(documents.masked_fill(~valid | (documents < 0), PADDING))
    if position_ids is None:
        return torch.zeros(rows, length, dtype=torch.int32, device=device).masked_fill(~valid, PADDING)
    return documents_from_positions(position_ids.to(device), valid).masked_fill(~valid, PADDING)


def shift_labels(labels: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
    """Return each token's target: the next token's label, if it is in the same document.

    Args:
        labels: (B, S), unshifted.
        document_ids: (B, S), negative for padding.

    Returns:
        (B, S) int64; −100 at every document's last token and at padding.
    """
    shifted = torch.full_like(labels, IGNORED, dtype=torch.int64)
    together = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] >= 0)
    shifted[:, :-1] = labels[:, 1:].to(torch.int64).masked_fill(~together, IGNORED)
    return shifted


def fill_padding(x: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
    """Return tokens or embeddings with padding replaced by the row's first token that is not padding.

    No token attends to padding and it has no loss, so its gradient is 0. But the embedding of a pad token is usually a
    row of zeros, at which 0 times the derivative of a norm is NaN.

    Args:
        x: (B, S) or (B, S, D).
        document_ids: (B, S), negative for padding. A row that is all padding takes a token of another row.
    """
    padding = document_ids < 0
    first, full = (~padding).int().argmax(1), padding.all(1)
    row = torch.where(full, full.int().argmin(), torch.arange(x.shape[0], device=x.device))
    filler = x[row, first[row]].detach()[:, None]
    padding = padding if x.dim() == 2 else padding[..., None]
    return torch.where(padding, filler, x)


def _shape(batch: Batch) -> tuple[int, int]:
    """Return (B, S)."""
    given = [key for key in ("input_ids", "inputs_embeds") if key in batch]
    if len(given) != 1:
        raise EngineError(
            f"a batch needs exactly one of input_ids and inputs_embeds; it has the keys {sorted(map(str, batch))}"
        )
    x = batch[given[0]]
    dims = 2 if given[0] == "input_ids" else 3
    if not isinstance(x, torch.Tensor) or x.dim() != dims or 0 in x.shape:
        shape = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        wanted = "(B, S)" if dims == 2 else "(B, S, D)"
        raise EngineError(f"{given[0]} is {shape}; a non-empty {wanted} tensor is needed")
    return x.shape[0], x.shape[1]


def _matrix(x: Any, key: str, rows: int, length: int) -> torch.Tensor | None:
    """Return ``x`` as (rows, length), a single row repeated."""
    if x is None:
        return None
    if isinstance(x, torch.Tensor) and x.dim() == 1:
        x = x[None]
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or x.shape[1] != length or x.shape[0] not in (1, rows):
        shape = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        hint = "; fold a 4D mask into document_ids" if key == "attention_mask" else ""
        raise EngineError(f"{key} is {shape}, but the rows are ({rows}, {length}): give a tensor of that shape{hint}")
    return x.expand(rows, length)

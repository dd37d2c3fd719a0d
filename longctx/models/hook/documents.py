"""Determine which document each token of an attention call belongs to, from the keywords that the model passes on.

``mask`` is what ``document_ids_as_mask`` returned: (B, 1, 1, keys) int32 document ids, -1 at padding; (B, 1, 1, 1) for
one document without padding. ``query`` (B, H, T, D) and ``key`` (B, G, Tk, D) give the numbers of tokens.
"""

from __future__ import annotations

import torch

from longctx.errors import ModelError
from longctx.models.hook.masks import documents_from_positions, separate_runs


def sharded_documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    document_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Return the (B, T) int32 document ids of this rank's tokens, which cannot be derived on a shard."""
    if query.shape[2] != key.shape[2]:
        raise ModelError(
            f"{type(module).__name__}: {query.shape[2]} queries and {key.shape[2]} keys on a shard: a cache of a "
            "sharded sequence is not supported here; pass use_cache=False"
        )
    if document_ids is None:
        raise ModelError(
            f"{type(module).__name__} runs on a shard without document_ids: pass the keyword document_ids=(B, T) int32 "
            "of the local tokens (-1 at padding) to the model, as engine.shard does. If you did, this model does not "
            "pass it on to its attention and cannot be sharded"
        )
    ids = _shaped(document_ids, query)
    if mask is not None and mask.shape[3] == ids.shape[1]:  # its padding is right for local tokens, its packing is not
        ids = torch.where(mask[:, 0, 0] < 0, -1, ids)
    return ids.to(torch.int32)


def whole_documents(
    query: torch.Tensor, mask: torch.Tensor | None, document_ids: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the (B, T) int32 document ids of an unsharded sequence, or None if it is one document without padding.

    document_ids take precedence, and an id that returns is a new document, as for position_ids. Those take precedence
    over the mask: transformers does not detect packed documents if a cache or a 2D mask is given, and they would then
    attend to each other.
    """
    found = None if mask is None or mask.shape[3] == 1 and query.shape[2] != 1 else mask[:, 0, 0]
    if document_ids is not None:
        ids = separate_runs(_shaped(document_ids, query))
    elif position_ids is not None and position_ids.dim() == 2:
        valid = None if found is None else found.expand(query.shape[0], -1) >= 0
        ids = documents_from_positions(_shaped(position_ids, query, "position_ids"), valid)
    elif found is not None:
        ids = found
    else:
        return None
    if found is not None:
        ids = torch.where(found < 0, -1, ids)
    ids = ids.to(torch.int32)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and not ids.any():
        return None  # cheaper without ids; on a GPU the check would cost a synchronisation
    return ids


def _shaped(ids: torch.Tensor, query: torch.Tensor, name: str = "document_ids") -> torch.Tensor:
    batch, tokens = query.shape[0], query.shape[2]
    if ids.dim() != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != tokens:
        raise ModelError(f"{name} has shape {tuple(ids.shape)}; these tokens need ({batch}, {tokens})")
    return ids.expand(batch, tokens)


def padded_tokens(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """Return (B, T) bool, False at padding, if the mask is as long as ``query``; else None, for no padding."""
    if mask is None or mask.shape[3] != query.shape[2]:
        return None
    return mask[:, 0, 0].expand(query.shape[0], -1) >= 0

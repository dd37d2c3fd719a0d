"""The attention function that transformers calls for ``attn_implementation="longctx"``.

It decides what transformers leaves to every attention function: which keys each query sees (causality, window,
documents, padding), whether a requested feature is supported, and which mesh the module belongs to.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.block import block_attention
from longctx.attention.ring import ring_attention
from longctx.errors import ModelError
from longctx.models.activations.host import fetch_ahead
from longctx.models.hook.binding import binding_of
from longctx.models.hook.bounded_layer import NOTES, attend_bounded, bounded_child
from longctx.models.hook.documents import sharded_documents, whole_documents
from longctx.models.hook.dropout import layer_seeds
from longctx.models.hook.masks import MaskRule
from longctx.models.hook.probe import without_mixing

# Keywords that a model passes on to its attention and that change nothing here.
_HARMLESS = frozenset(
    "use_cache cache_position num_items_in_batch labels shift_labels output_hidden_states output_router_logits "
    "return_dict deterministic past_key_values past_key_value layer_idx position_embeddings".split()
)
# Advice on some unsupported keywords.
_ADVICE = {
    "position_bias": "an additive position bias (T5) is not supported",
    "cu_seq_lens_q": "give the documents as document_ids or position_ids instead",
    "cu_seq_lens_k": "give the documents as document_ids or position_ids instead",
    "max_length_q": "give the documents as document_ids or position_ids instead",
    "max_length_k": "give the documents as document_ids or position_ids instead",
    "seq_idx": "give the documents as document_ids or position_ids instead",
    "output_attentions": "attention weights are never formed; use attn_implementation='eager' to see them",
    "encoder_hidden_states": "cross-attention is not supported",
}


def longctx_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    document_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    dropout_seeds: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention over the whole sequence, of which this rank holds a shard if ``module`` is bound to a mesh.

    Args:
        query: (B, H, T, D).
        key: (B, G, Tk, D), G dividing H; Tk > T only with a cache, on one device.
        value: (B, G, Tk, Dv).
        attention_mask: what ``document_mask`` returned, or None. A T×T mask is refused.
        sliding_window: keys visible to the left including self (and as many to the right if not causal).
        document_ids: (B, T) of the local tokens, -1 at padding: required if the sequence is sharded.
        position_ids: (B or 1, T); documents of an unsharded sequence are derived from them without document_ids.
        dropout: fraction of the probabilities dropped in training.
        softcap: bound of the logits (Gemma 2).
        s_aux: (H,) attention sinks (GPT-OSS).
        dropout_seeds: (B,) int64, equal on all ranks of the sequence: required to train a shard with dropout.

    Returns:
        (B, T, H, Dv), and None for the weights. Padded queries get 0.

    Raises:
        ModelError: a requested feature is not supported, or document_ids is missing on a shard.
    """
    binding = binding_of(module)
    _refuse(module, others)
    causal = _causal(module, is_causal)
    memory = bounded_child(module)
    decoding = binding is not None and binding.cache is not None and binding.cache.ready
    if not decoding:  # while decoding, the mask is that of the whole context
        _check_mask(module, attention_mask, None if memory is not None else key.shape[2])
    if binding is not None and (binding.seen is not None or not binding.checked):
        binding.called.add(id(module))
    query, key, value = _autocast(query, key, value)
    if binding is not None and binding.seen is not None:
        if memory is None:
            _agree(module, getattr(attention_mask, "longctx_rule", None), causal, sliding_window)
        module.__dict__.pop(NOTES, None)  # the probe skips bounded-state layers too
        binding.seen.append(torch.cat([x[0].transpose(0, 1).flatten(1) for x in (query, key, value)], 1).float())
        return without_mixing(query, key, value), None
    fetch_ahead(query)
    extras: dict[str, Any] = {"softcap": softcap, "sink": s_aux}
    if dropout and module.training:
        extras |= {"dropout_p": dropout, "dropout_seed": layer_seeds(module, query, dropout_seeds)}
    if memory is not None:
        out = attend_bounded(
            module, binding, query, key, value, attention_mask, causal=causal, scale=scaling,
            document_ids=document_ids, position_ids=position_ids, extras=extras,
        )  # fmt: skip
        return out, None
    _agree(module, getattr(attention_mask, "longctx_rule", None), causal, sliding_window)
    extras["scale"] = scaling
    window: int | tuple[int, int] | None = sliding_window
    if sliding_window is not None and not causal:
        window = (sliding_window - 1, sliding_window - 1)  # keys strictly to the left and to the right
    if decoding:
        out = _decode(module, query, causal, sliding_window, extras)
        return out.transpose(1, 2).contiguous(), None
    mesh, layout, ids = None, "contiguous", None
    if binding is not None and binding.sharded:
        mesh, layout = binding.mesh, binding.layout
        ids = sharded_documents(module, query, key, attention_mask, document_ids)
    elif query.shape[2] == key.shape[2]:
        ids = whole_documents(query, attention_mask, document_ids, position_ids)
    else:
        out = _cached(
            module, query, key, value, attention_mask, position_ids, causal=causal, window=window, extras=extras
        )
        return out.transpose(1, 2).contiguous(), None
    out = ring_attention(  # type: ignore[assignment]  # return_lse is off: one tensor
        query, key, value, mesh=mesh, layout=layout, causal=causal, window=window, document_ids=ids,
        backend="auto" if binding is None else binding.backend, **extras,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: torch.nn.Module, others: dict[str, Any]) -> None:
    """Raise for every keyword that would change the result and is not supported."""
    name = type(module).__name__
    for keyword, value in others.items():
        if value is None or value is False or keyword in _HARMLESS:
            continue
        advice = _ADVICE.get(keyword, "longctx does not know it")
        raise ModelError(f"{name} passes {keyword}= to its attention: {advice}")
    config = getattr(module, "config", None)
    crossing = "Cross" in name or getattr(module, "is_cross_attention", False)
    if crossing or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} belongs to an encoder-decoder or attends across sequences: longctx supports only "
            "self-attention of decoders and of encoders"
        )


def _causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    if is_causal is not None:
        return bool(is_causal)
    if getattr(getattr(module, "config", None), "is_causal", None) is False:
        return False  # a decoder used as an encoder: only its config says that its mask is full
    return bool(getattr(module, "is_causal", True))


def _check_mask(module: torch.nn.Module, mask: torch.Tensor | None, keys: int | None) -> None:
    """Raise for masks other than ``document_mask``'s; ``keys`` is None if the layer does not cache keys."""
    if mask is None:
        return
    ours = isinstance(mask, torch.Tensor) and mask.dtype == torch.int32 and mask.dim() == 4
    if not ours or mask.shape[2] != 1 or (keys is not None and mask.shape[3] not in (1, keys)):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ModelError(
            f"{type(module).__name__} got an attention mask of {shape}: longctx takes no T x T mask. "
            "Give padding as a (B, T) attention_mask, or documents and padding as document_ids"
        )


def _agree(module: torch.nn.Module, rule: MaskRule | None, causal: bool, window: int | None) -> None:
    """Raise if the mask that the model requested and the keywords of this layer contradict each other."""
    if rule is not None and (rule.causal, rule.window) != (causal, window):
        raise ModelError(
            f"{type(module).__name__} asks for causal={causal}, window={window}, but its model builds a mask with "
            f"causal={rule.causal}, window={rule.window}: longctx cannot tell which one is right"
        )


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast all inputs to autocast's dtype, as autocast does for torch's own attention."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(t.to(dtype) for t in tensors)
    return tensors


def _decode(
    module: torch.nn.Module, query: torch.Tensor, causal: bool, window: int | None, extras: dict[str, Any]
) -> torch.Tensor:
    """Attend from the newest tokens, which every rank holds, to a cache that is sharded over the ranks."""
    binding = binding_of(module)
    assert binding is not None
    if not causal:
        raise ModelError(f"{type(module).__name__} attends in both directions: it has no cache to generate from")
    out: torch.Tensor = binding.cache.attend(int(module.layer_idx), query, window=window, **extras)  # type: ignore[arg-type]
    return out


def _cached(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    *,
    causal: bool,
    window: int | tuple[int, int] | None,
    extras: dict[str, Any],
) -> torch.Tensor:
    """Attend from the newest tokens to a growing cache on one device; the last query sees the last key."""
    tokens, keys = query.shape[2], key.shape[2]
    if tokens > keys:
        raise ModelError(f"{type(module).__name__}: {tokens} queries, only {keys} keys: this is not self-attention")
    ids = None if mask is None or mask.shape[3] == 1 else mask[:, 0, 0]
    first = getattr(module, "longctx_checks", getattr(module, "layer_idx", None) in (0, None))
    if position_ids is not None and position_ids.dim() == 2 and first:
        known = keys if ids is None else (ids >= 0).sum(-1)
        if bool((position_ids[:, -1] + 1 < known).any()):
            raise ModelError(
                "the cache holds more keys than the position of the last token allows: a packed prompt or a prefix was "
                "cached, and which keys belong to this token's document is no longer known; use use_cache=False"
            )
    own = None if ids is None else ids[:, -tokens:]
    out, _ = block_attention(
        query, key, value, causal=causal, window=window, document_ids=own, key_document_ids=ids, **extras
    )
    return out

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
from longctx.models.hook.position_probe import without_mixing

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
        attention_mask: what ``document_ids_as_mask`` returned, or None. A T×T mask is refused.
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
    binding, mixer, causal = binding_of(module), bounded_child(module), _causal(module, is_causal)
    _refuse(module, others)
    decoding = binding is not None and binding.cache is not None and binding.cache.ready
    if not decoding:  # while decoding, the mask is that of the whole context
        _check_mask(module, attention_mask, None if mixer is not None else key.shape[2])
    if mixer is None:
        _agree(module, getattr(attention_mask, "longctx_rule", None), causal, sliding_window)
    query, key, value = _autocast(query, key, value)
    if binding is not None and (binding.probe_records is not None or not binding.checked):
        binding.called.add(id(module))  # for trace.judge, which looks for layers that never got here
    if binding is not None and binding.probe_records is not None:  # position_probe.py runs the model
        return _record_for_probe(module, binding.probe_records, query, key, value), None

    fetch_ahead(query)  # registers the prefetch of offloaded activations; does nothing in other models
    options: dict[str, Any] = {"softcap": softcap, "sink": s_aux}
    if dropout and module.training:
        options |= {"dropout_p": dropout, "dropout_seed": layer_seeds(module, query, dropout_seeds)}
    if mixer is not None:  # ABC, Cottention, window: its own modes are in attend_bounded
        out = attend_bounded(
            module, binding, query, key, value, attention_mask, causal=causal, scale=scaling,
            document_ids=document_ids, position_ids=position_ids, options=options,
        )  # fmt: skip
        return out, None

    options |= {"scale": scaling, "causal": causal, "window": _window(sliding_window, causal)}
    if decoding:  # new tokens, which every rank holds, and a cache sharded over the ranks
        out = _decode(module, query, sliding_window, options)
    elif binding is not None and binding.sharded:  # a shard of the sequence: training, evaluation, prefill
        ids = sharded_documents(module, query, key, attention_mask, document_ids)
        options |= {"mesh": binding.mesh, "layout": binding.layout, "document_ids": ids, "backend": binding.backend}
        out = ring_attention(query, key, value, **options)  # type: ignore[assignment]  # return_lse is off: one tensor
    elif query.shape[2] == key.shape[2]:  # the whole sequence on this device
        ids_or_none = whole_documents(query, attention_mask, document_ids, position_ids)
        options |= {"layout": "contiguous", "document_ids": ids_or_none}
        options |= {"backend": "auto" if binding is None else binding.backend}
        out = ring_attention(query, key, value, **options)  # type: ignore[assignment]
    else:  # new tokens and a growing cache on this device
        out = _cached(module, query, key, value, attention_mask, position_ids, options)
    return out.transpose(1, 2).contiguous(), None


def _window(sliding_window: int | None, causal: bool) -> int | tuple[int, int] | None:
    """Return the window as `ring_attention` takes it: a number includes the token itself, a pair does not."""
    if sliding_window is None or causal:
        return sliding_window
    return sliding_window - 1, sliding_window - 1


def _record_for_probe(
    module: torch.nn.Module,
    records: list[torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Append each token's q, k and v, (T, features) fp32, and return (B, T, H, Dv) in which no tokens are mixed."""
    module.__dict__.pop(NOTES, None)  # bounded layers do not run either
    records.append(torch.cat([x[0].transpose(0, 1).flatten(1) for x in (query, key, value)], 1).float())
    return without_mixing(query, key, value)


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
    """Raise for masks other than ``document_ids_as_mask``'s; ``keys`` is None if the layer does not cache keys."""
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


def _decode(module: torch.nn.Module, query: torch.Tensor, window: int | None, options: dict[str, Any]) -> torch.Tensor:
    """Attend from the newest tokens, which every rank holds, to a cache that is sharded over the ranks."""
    binding = binding_of(module)
    assert binding is not None
    if not options["causal"]:
        raise ModelError(f"{type(module).__name__} attends in both directions: it has no cache to generate from")
    options = {name: value for name, value in options.items() if name != "causal"} | {"window": window}
    out: torch.Tensor = binding.cache.attend(int(module.layer_idx), query, **options)  # type: ignore[arg-type]
    return out


def _cached(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attend from the newest tokens to a growing cache on one device; the last query sees the last key."""
    tokens, keys = query.shape[2], key.shape[2]
    if tokens > keys:
        raise ModelError(f"{type(module).__name__}: {tokens} queries, only {keys} keys: this is not self-attention")
    ids = None if mask is None or mask.shape[3] == 1 else mask[:, 0, 0]
    # Positions are equal in all layers, so one layer checks them: bounded_layer.py marks it, else it is the first.
    checks = getattr(module, "longctx_checks", getattr(module, "layer_idx", None) in (0, None))
    if position_ids is not None and position_ids.dim() == 2 and checks:
        known = keys if ids is None else (ids >= 0).sum(-1)
        if bool((position_ids[:, -1] + 1 < known).any()):
            raise ModelError(
                "the cache holds more keys than the position of the last token allows: a packed prompt or a prefix was "
                "cached, and which keys belong to this token's document is no longer known; use use_cache=False"
            )
    own = None if ids is None else ids[:, -tokens:]
    out, _ = block_attention(query, key, value, document_ids=own, key_document_ids=ids, **options)
    return out

"""Attach a bounded-state module to an attention layer of a transformers model, and run it instead of attention.

The layer keeps its projections, norms and rotary positions. It gets a child module, the mixer (ABC or Cottention),
named ``memory`` in state dicts, which transformers' attention function calls. That function does not get the layer's
input and cache, so a forward hook stores them when the layer is entered.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from longctx.errors import ModelError
from longctx.models.hook.binding import Binding
from longctx.models.hook.documents import padded_tokens, sharded_documents, whole_documents
from longctx.nn.kinds import Kind, Ring, read_layers
from longctx.nn.mixers import make_mixer

CHILD = "memory"  # part of the keys of saved weights
NOTES = "longctx_notes"


class Notes(NamedTuple):
    """Inputs of the layer's current forward call."""

    inputs: torch.Tensor  # (B, T, hidden)
    cache: Any  # the StateLayer of this layer, or None


def install(model: Any, config: Any, path: str) -> None:
    """Attach the bounded-state modules of ``config.attention_layers`` to ``model``; keep those of the right kind.

    Args:
        path: of a layer's attention module, with ``{}`` for the layer index.
    """
    layers = config.num_hidden_layers
    kinds = read_layers(config.attention_layers, layers) if config.attention_layers else (Ring(),) * layers
    exact = [index for index, kind in enumerate(kinds) if isinstance(kind, Ring)]
    for index, kind in enumerate(kinds):
        module = model.get_submodule(path.format(index))
        module.longctx_checks = index in exact[:1]  # equal in all layers, so cached tokens' positions are checked once
        old = bounded_child(module)
        if old is not None and old.kind == kind:
            continue
        if old is not None:
            _remove(module)
        if not isinstance(kind, Ring):
            _add(module, kind, config, index)


def bounded_child(module: torch.nn.Module) -> Any:
    """Return the bounded-state module of an attention layer, or None for softmax attention."""
    return module._modules.get(CHILD)


def _add(module: torch.nn.Module, kind: Kind, config: Any, index: int) -> None:
    heads, width = config.num_attention_heads, config.hidden_size
    mixer = make_mixer(
        kind,
        hidden_size=width,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or width // heads,
        max_length=config.max_position_embeddings,
        layer_index=index,
    )
    assert mixer is not None
    like = next(module.parameters())
    if like.device.type != "meta":
        mixer = mixer.to(device=like.device, dtype=like.dtype)
    module.add_module(CHILD, mixer.train(module.training))
    module.longctx_hooks = [  # type: ignore[assignment]
        module.register_forward_pre_hook(_enter, with_kwargs=True),
        module.register_forward_hook(_leave),
    ]


def _remove(module: Any) -> None:
    for handle in module.longctx_hooks:
        handle.remove()
    del module.longctx_hooks
    delattr(module, CHILD)


def _enter(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Store the layer's input and its cache layer, which holds a state instead of keys and values."""
    cache = kwargs.get("past_key_values")
    layer = None
    if cache is not None:
        from longctx.decode.caches.state import state_layer

        layer = state_layer(getattr(cache, "self_attention_cache", cache), module.layer_idx)  # type: ignore[arg-type]
    setattr(module, NOTES, Notes(args[0] if args else kwargs["hidden_states"], layer))


def _leave(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if module.__dict__.pop(NOTES, None) is not None:
        raise ModelError(
            f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')}) has a bounded state, but attended "
            "without it: set attn_implementation='longctx' again"
        )


def attend_bounded(
    module: torch.nn.Module,
    binding: Binding | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    document_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Run the bounded-state module of ``module``; return (B, T, H, Dv).

    Args:
        query: (B, H, T, D); key (B, G, T, D) and value (B, G, T, Dv) of the same, new tokens, also with a cache.
        attention_mask: what ``document_ids_as_mask`` returned, for all keys that the model has seen.
        options: of softmax attention: softcap, sink, dropout_p, dropout_seed.

    Raises:
        ModelError: an option that a bounded state does not support.
    """
    mixer, notes = bounded_child(module), module.__dict__.pop(NOTES, None)
    _check_call(module, binding, notes, query, key, options)
    tokens, cache = query.shape[2], notes.cache
    options = {name: value for name, value in options.items() if _given(value)}
    backend = binding.backend if binding is not None and mixer.exact else "auto"
    compute = partial(mixer, query, key, value, notes.inputs, causal=causal, scale=scale, backend=backend, **options)
    mask = None if attention_mask is None or attention_mask.shape[3] < tokens else attention_mask[..., -tokens:]
    ring = binding if binding is not None and binding.sharded else None
    ids: torch.Tensor | None
    # Four modes: is there a cache, whose state is continued, and does this rank hold a shard or the whole sequence?
    if cache is None and ring is None:  # training or evaluation of whole sequences
        ids = whole_documents(query, mask, document_ids, position_ids)
        out = compute(document_ids=None if ids is None else ids.long())
    elif cache is None and ring is not None:  # of sharded ones
        ids = sharded_documents(module, query, key, mask, document_ids).long()
        out = compute(mesh=ring.mesh, layout=ring.layout, document_ids=ids)
    elif ring is not None and not ring.cache.ready:  # the prompt of a sharded generation
        ids = sharded_documents(module, query, key, mask, document_ids).long()
        prompt = {"mesh": ring.mesh, "layout": ring.layout, "length": ring.cache.context.prompt_length}
        out, cache.state = compute(document_ids=ids, return_state=True, **prompt)
    else:  # the prompt of a generation on one device, or new tokens, which every rank holds
        shape = query.shape[0], tokens
        if document_ids is None:
            document_ids = cache.documents_of(position_ids, padded_tokens(mask, query), shape, query.device)
        out, cache.state = compute(document_ids=document_ids.long(), state=cache.state, return_state=True)
    return out.transpose(1, 2).contiguous()


def _given(value: Any) -> bool:
    """Return whether an option is in use."""
    return isinstance(value, torch.Tensor) or (value is not None and value != 0.0)


def _check_call(
    module: torch.nn.Module,
    binding: Binding | None,
    notes: Notes | None,
    query: torch.Tensor,
    key: torch.Tensor,
    options: dict[str, Any],
) -> None:
    """Raise for calls that a bounded state does not support."""
    name, mixer = type(module).__name__, bounded_child(module)
    if notes is None:
        raise ModelError(f"{name} has a bounded state and must be called as a module, not .forward")
    if key.shape[2] != query.shape[2]:
        raise ModelError(f"{name}: {query.shape[2]} queries, {key.shape[2]} keys: a bounded state takes new keys")
    refused = sorted(option for option, value in options.items() if _given(value))
    if refused and not mixer.exact:
        raise ModelError(
            f"{name} asks for {', '.join(refused)}, which a layer of kind {mixer.kind.name} "
            "does not have; set attention dropout (attention_dropout, attn_pdrop, attention_probs_dropout_prob) to 0 "
            "in the model's config, and leave layers with capped logits or sinks as they are"
        )
    if binding is not None and binding.sharded and notes.cache is not None and binding.cache is None:
        raise ModelError(
            f"{name} is bound to a ring of {binding.mesh.sequence_size} and was given a cache: generate "
            "with longctx.generate(model, …, mesh=mesh), or pass use_cache=False"
        )

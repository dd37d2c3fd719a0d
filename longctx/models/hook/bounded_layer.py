"""Attach a bounded-state module to an attention layer of a transformers model, and run it instead of attention.

The layer keeps its projections, norms and rotary positions. It gets a child module ``memory`` (ABC or Cottention),
which transformers' attention function calls. That function does not get the layer's input and cache, so a forward hook
stores them when the layer is entered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from longctx.errors import ModelError
from longctx.models.hook.binding import Binding
from longctx.models.hook.documents import padded_tokens, sharded_documents, whole_documents
from longctx.nn.kinds import Kind, Ring, read_layers
from longctx.nn.mixers import make_mixer

CHILD = "memory"
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
        module.longctx_checks = index in exact[:1]  # positions of cached tokens are checked in one layer only
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
    memory = make_mixer(
        kind,
        hidden_size=width,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or width // heads,
        max_length=config.max_position_embeddings,
        place=index,
    )
    assert memory is not None
    like = next(module.parameters())
    if like.device.type != "meta":
        memory = memory.to(device=like.device, dtype=like.dtype)
    module.add_module(CHILD, memory.train(module.training))
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
    extras: dict[str, Any],
) -> torch.Tensor:
    """Run the bounded-state module of ``module``; return (B, T, H, Dv).

    Args:
        query: (B, H, T, D); key (B, G, T, D) and value (B, G, T, Dv) of the same, new tokens, also with a cache.
        attention_mask: what ``document_mask`` returned, for all keys that the model has seen.
        extras: options of softmax attention: softcap, sink, dropout.

    Raises:
        ModelError: an option that a bounded state does not support.
    """
    memory, notes = bounded_child(module), module.__dict__.pop(NOTES, None)
    if notes is None:
        raise ModelError(f"{type(module).__name__} has a bounded state and must be called as a module, not .forward")
    tokens = query.shape[2]
    if key.shape[2] != tokens:
        raise ModelError(
            f"{type(module).__name__}: {tokens} queries, {key.shape[2]} keys: a bounded state takes new keys"
        )
    extras = {name: value for name, value in extras.items() if value is not None and value != 0.0}
    if extras and not memory.exact:
        raise ModelError(
            f"{type(module).__name__} asks for {', '.join(sorted(extras))}, which a layer of kind {memory.kind.name} "
            "does not have; set attention dropout (attention_dropout, attn_pdrop, attention_probs_dropout_prob) to 0 "
            "in the model's config, and leave layers with capped logits or sinks as they are"
        )
    mask = None if attention_mask is None or attention_mask.shape[3] < tokens else attention_mask[..., -tokens:]
    backend = binding.backend if binding is not None and memory.exact else "auto"
    common = dict(causal=causal, scale=scale, backend=backend, **extras)
    ring = binding if binding is not None and binding.sharded else None
    if ring is not None and notes.cache is not None and ring.cache is None:
        raise ModelError(
            f"{type(module).__name__} is bound to a ring of {ring.mesh.sequence_size} and was given a cache: generate "
            "with longctx.generate(model, …, mesh=mesh), or pass use_cache=False"
        )
    ids: torch.Tensor | None
    if ring is not None and notes.cache is not None and not ring.cache.ready:  # prompt of a sharded generation
        prompt_ids = sharded_documents(module, query, key, mask, document_ids).long()
        out, notes.cache.state = memory(
            query, key, value, notes.inputs, mesh=ring.mesh, layout=ring.layout, document_ids=prompt_ids,
            length=ring.cache.context.prompt_length, return_state=True, **common,
        )  # fmt: skip
    elif notes.cache is not None:
        valid = padded_tokens(mask, query)
        shape = (query.shape[0], tokens)
        ids, state = document_ids, notes.cache.state
        if ids is None:
            ids = notes.cache.documents_of(position_ids, valid, shape, query.device)
        out, notes.cache.state = memory(
            query, key, value, notes.inputs, document_ids=ids.long(), state=state, return_state=True, **common
        )
    elif ring is not None:
        ids = sharded_documents(module, query, key, mask, document_ids).long()
        out = memory(query, key, value, notes.inputs, mesh=ring.mesh, layout=ring.layout, document_ids=ids, **common)
    else:
        found = whole_documents(query, mask, document_ids, position_ids)
        out = memory(query, key, value, notes.inputs, document_ids=None if found is None else found.long(), **common)
    return out.transpose(1, 2).contiguous()

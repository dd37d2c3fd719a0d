"""enable_el(): make a transformers model generate from hidden states instead of cached keys and values, exactly.

The model's own generate() is unchanged: decoder layers cache their inputs, cross attention reads the encoder's output
directly (once for all layers and beams), and prompts are cached once for all beams. Prompts run through the model's own
attention, whose keys and values are then discarded. Weights are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

from longctx.attention.merge import Partial, merge
from longctx.decode.caches.hidden import HiddenLayer, append_hidden
from longctx.decode.caches.prompt import self_attention_cache, use_layers
from longctx.decode.caches.sharded import ShardedCache
from longctx.decode.el import el_attention, expanded_attention
from longctx.decode.sharded import merge_over_ranks
from longctx.errors import ModelError
from longctx.generation.beams import Beams, expand_once
from longctx.generation.projections import AttentionSpec, spec_of, unsupported
from longctx.mesh import Mesh
from longctx.models.hook.bounded_layer import bounded_child

_STATE = "longctx_el"
_REPLACED = ("_expand_inputs_for_generation", "_prepare_cache_for_generation")


def enable_el(model: torch.nn.Module, *, cross: bool = True, causal: bool = True) -> list[str]:
    """Use EL-attention in every layer where it is exact, until `disable_el`.

    Args:
        model: a transformers model with generate(); training and forward without a cache are unchanged.
        cross: cross attention reads the encoder's output itself: 2 * layers * beams times fewer bytes.
        causal: self-attention of the decoder caches its inputs: half the bytes, and the prompt once for all beams.
            Layers with a bounded state are unchanged.

    Returns:
        names of the modules that were changed.

    Raises:
        ModelError: no layer of the model supports it, with the reason (RoPE rotates keys by their positions).
    """
    if hasattr(model, _STATE):
        disable_el(model)
    state = _State()
    for name, module in model.named_modules():
        spec = spec_of(module)
        if spec is None or not spec.decodes(module, name) or bounded_child(module) is not None:
            continue
        crossing = spec.crosses(module, name)
        if not (cross if crossing else causal):
            continue
        state.changed.append(name)
        state.crosses |= crossing
        if not crossing:
            state.layers.append(int(module.layer_idx))
        original = module.forward
        module.forward = MethodType(_cross(spec, original, state) if crossing else _self(spec, original), module)
    if not state.changed:
        raise unsupported(model)
    setattr(model, _STATE, state)
    for name, make in zip(_REPLACED, (expand_once, _prepare), strict=True):
        if hasattr(model, name):
            setattr(model, name, MethodType(make(getattr(model, name), state), model))
    return list(state.changed)


def disable_el(model: torch.nn.Module) -> None:
    """Restore a model's own attention; no effect if it is in use."""
    state = getattr(model, _STATE, None)
    if state is None:
        return
    for name in state.changed:
        del model.get_submodule(name).forward
    for name in _REPLACED:
        model.__dict__.pop(name, None)
    delattr(model, _STATE)


@contextmanager
def spread_source(model: Any, mesh: Mesh) -> Iterator[None]:
    """Treat the encoder's output that cross attention gets as this rank's shard of it.

    Raises:
        ModelError: the model's cross attention computes keys and values.
    """
    state = getattr(model, _STATE, None)
    if state is None or not state.crosses:
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder whose cross attention caches keys and values: "
            "call longctx.enable_el(model) to share the source between ranks, or generate on one (mesh of ring 1)"
        )
    state.mesh = mesh
    try:
        yield
    finally:
        state.mesh = None


def el_layers(model: torch.nn.Module) -> list[int]:
    """Return the indices of the decoder layers that cache their inputs since `enable_el`."""
    state = getattr(model, _STATE, None)
    return [] if state is None else list(state.layers)


class _State(Beams):
    """The changes that enable_el made to a model, and the number of beams of the generation in progress."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: list[str] = []
        self.layers: list[int] = []
        self.mesh: Mesh | None = None  # its ranks hold shards of the encoder's output during a generation


def _cross(spec: AttentionSpec, original: Any, state: _State) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        source = kwargs.get(spec.hidden)
        folded = source is not None and source.shape[0] != hidden_states.shape[0]
        if self.training or source is None or args or not (folded or kwargs.get("past_key_values") is not None):
            return original(hidden_states, *args, **kwargs)
        mask_name = "encoder_attention_mask" if spec.hidden == "encoder_hidden_states" else spec.mask
        mask = _mask(kwargs.get(mask_name), source.shape[1])
        if mask is not None and mask.shape[0] not in (1, hidden_states.shape[0]):
            mask = mask.repeat_interleave(hidden_states.shape[0] // mask.shape[0], 0)
        weights = spec.projections(self)
        out = el_attention(
            hidden_states,
            source,
            **vars(weights),
            heads=getattr(self, spec.heads),
            scale=_scale(self, spec),
            mask=mask,
            mesh=state.mesh,
        )
        return out, *(None,) * (spec.outputs - 1)

    return forward


def _self(spec: AttentionSpec, original: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        cache = kwargs.get("past_key_values")
        if cache is None or args:
            return original(hidden_states, *args, **kwargs)
        spread = self_attention_cache(cache)
        if isinstance(spread, ShardedCache):
            return _over_ranks(self, spec, original, hidden_states, spread, kwargs)
        past, parts = append_hidden(spread, hidden_states, int(self.layer_idx))
        tokens = hidden_states.shape[1]
        mask = _mask(kwargs.get(spec.mask), past + tokens)
        if not past:
            kwargs |= {"past_key_values": None, spec.mask: _of_prompt(kwargs.get(spec.mask), tokens)}
            if spec.bias is not None and kwargs.get(spec.bias) is not None:
                kwargs[spec.bias] = kwargs[spec.bias][..., :tokens]
            return original(hidden_states, **kwargs)
        bias = None if spec.bias is None else _position_bias(self, kwargs.get(spec.bias), past, tokens)
        out = _over_parts(self, spec, hidden_states, parts, mask, bias)
        return (out, None) if spec.bias is None else (out, bias, None)

    return forward


def _over_ranks(
    module: Any, spec: AttentionSpec, original: Any, x: torch.Tensor, cache: ShardedCache, kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Attend from hidden states sharded over ranks; W_v is applied before the merge: D + 1 numbers per query head."""
    held: Any = cache.layers[int(module.layer_idx)]
    prompt = not held.is_initialized
    held.update(x[:, None], x[:, None, :, :0])
    if prompt:
        result: tuple[Any, ...] = original(x, **(kwargs | {"past_key_values": None}))
        return result
    weights, heads = spec.projections(module), getattr(module, spec.heads)
    q = torch.nn.functional.linear(x, weights.w_q, weights.b_q).unflatten(-1, (heads, -1)).transpose(1, 2)
    of_prompt, of_new = cache.context.visible(held.seen, x.shape[1], None)
    of_prompt = of_prompt.repeat_interleave(cache.beams, 0)
    partial: Partial | None = None
    for hidden, visible in ((held.prompt[0], of_prompt), (held.keys, of_new)):
        part = expanded_attention(
            q, hidden[:, 0], weights.w_k, weights.w_v, b_v=weights.b_v, scale=_scale(module, spec),
            mask=visible[:, None],
        )[:2]  # fmt: skip
        partial = part if partial is None else merge(partial, part)
    assert partial is not None
    out = merge_over_ranks(partial, cache.mesh)[0].transpose(1, 2).flatten(2).to(x.dtype)
    return torch.nn.functional.linear(out, weights.w_o, weights.b_o), None


def _over_parts(
    module: Any,
    spec: AttentionSpec,
    x: torch.Tensor,
    parts: list[torch.Tensor],
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attend from hidden states in parts, of which the last contains x itself; merge the partial results by lse."""
    weights, heads = spec.projections(module), getattr(module, spec.heads)
    q = torch.nn.functional.linear(x, weights.w_q, weights.b_q).unflatten(-1, (heads, -1)).transpose(1, 2)
    keys = sum(part.shape[1] for part in parts)
    partials, start = [], 0
    for part in parts:
        stop = start + part.shape[1]
        added = None if bias is None else _table(bias[..., start:stop])
        out, lse = expanded_attention(
            q, part, weights.w_k, weights.w_v, b_v=weights.b_v, scale=_scale(module, spec), causal=True,
            q_offset=keys - x.shape[1] - start, mask=None if mask is None else mask[..., start:stop], bias=added,
        )[:2]  # fmt: skip
        partials.append((out, lse))
        start = stop
    whole = torch.logsumexp(torch.stack([lse for _, lse in partials]), 0)
    whole = whole.masked_fill(whole == -torch.inf, 0.0)
    merged = torch.stack([out * torch.exp(lse - whole)[..., None] for out, lse in partials]).sum(0)
    return torch.nn.functional.linear(merged.transpose(1, 2).flatten(2).to(x.dtype), weights.w_o, weights.b_o)


def _table(bias: torch.Tensor) -> Any:
    """Wrap a (1, H, T, S) tensor as the function of positions that EL-attention expects."""

    def look_up(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return bias[0, :, :, keys]

    return look_up


def _position_bias(module: Any, given: torch.Tensor | None, past: int, tokens: int) -> torch.Tensor:
    """Return T5's bias of the new tokens, (1, H, T, past + T): the first layer's table, passed from layer to layer."""
    if given is not None:
        return given
    if not module.has_relative_attention_bias:
        return torch.zeros(1, module.n_heads, tokens, past + tokens, device=module.o.weight.device)
    bias = module.compute_bias(tokens, past + tokens, past_seen_tokens=past)
    assert isinstance(bias, torch.Tensor)
    return bias


def _scale(module: Any, spec: AttentionSpec) -> float:
    return float(module.scaling) if spec.scaled else 1.0


def _of_prompt(mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """Return the model's own mask without the slots that a static cache has not filled yet."""
    return mask if mask is None else mask[..., :tokens]


def _mask(mask: Any, keys: int) -> torch.Tensor | None:
    """Return transformers' mask, bool or additive, (rows, 1, T, keys), or None."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        raise ModelError(
            f"EL-attention got a mask of {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}: load the model "
            "with attn_implementation 'sdpa' or 'eager'"
        )
    if mask.dtype == torch.int32:  # longctx's own: document ids of the keys, negative at padding
        return mask[..., :keys] >= 0 if mask.shape[-1] >= keys > 1 else None
    return mask[..., :keys]


def _prepare(original: Any, state: _State) -> Any:
    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = model_kwargs.get("past_key_values")
        result = original(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and given is None and state.layers:
            use_layers(cache, state.layers, HiddenLayer, state.beams)
        return result

    return prepare

"""share_beams(): cache the keys and values of a prompt and of an encoder's output once for all beams of generate().

A beam search usually caches the prompt ``beams`` times; here it is cached once, and all beams of a row read it in one
matrix product. It works for any model whose attention goes through transformers' interface, RoPE included.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from longctx.decode.caches.prompt import PromptLayer, SourceLayer, self_attention_cache, use_layers
from longctx.errors import ModelError

NAME = "longctx_beams"
_STATE = "longctx_beams"
_REPLACED = ("_expand_inputs_for_generation", "_prepare_cache_for_generation")


class Beams:
    """State of the generation in progress."""

    def __init__(self) -> None:
        self.crosses = False
        self.beams = 1


def share_beams(model: Any) -> None:
    """Cache prompts and encoder outputs once for all beams in ``model.generate()``, until `unshare_beams`.

    Raises:
        ModelError: the model adds a bias to its logits (T5), or does not use transformers' attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if hasattr(model, _STATE):
        unshare_beams(model)
    if any(hasattr(module, "relative_attention_bias") for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} adds a position bias to its logits, which shared beams do not support"
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    state = Beams()
    state.crosses = bool(getattr(model.config, "is_encoder_decoder", False))
    setattr(model, _STATE, (state, model.config._attn_implementation))
    model.set_attn_implementation(NAME)
    model._expand_inputs_for_generation = MethodType(expand_once(model._expand_inputs_for_generation, state), model)
    model._prepare_cache_for_generation = MethodType(_prepare(model._prepare_cache_for_generation, state), model)


def unshare_beams(model: Any) -> None:
    """Restore a model's own caches; no effect if they are in use."""
    if hasattr(model, _STATE):
        model.set_attn_implementation(getattr(model, _STATE)[1])
        for name in (*_REPLACED, _STATE):
            delattr(model, name)


def expand_once(original: Any, state: Beams) -> Any:
    def expand(self: Any, expand_size: int = 1, **kwargs: Any) -> Any:
        """Repeat the decoder's inputs for every beam, but not the encoder's output and its padding.

        These three must agree: transformers builds the cross-attention mask with the encoder's rows.
        """
        state.beams = expand_size
        if kwargs.get("encoder_outputs") is None or not state.crosses:
            return original(expand_size=expand_size, **kwargs)
        held = {name: kwargs[name] for name in ("encoder_outputs", "attention_mask") if kwargs.get(name) is not None}
        others = {name: value for name, value in kwargs.items() if name not in held}
        ids, expanded = original(expand_size=expand_size, encoder_outputs=type(held["encoder_outputs"])(), **others)
        return ids, expanded | held

    return expand


def _prepare(original: Any, state: Beams) -> Any:
    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = model_kwargs.get("past_key_values")
        result = original(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and given is None:
            layers = len(self_attention_cache(cache).layers) or int(self.config.get_text_config().num_hidden_layers)
            use_layers(cache, list(range(layers)), PromptLayer, state.beams)
            if state.crosses:
                cache.cross_attention_cache.layers = [SourceLayer() for _ in range(layers)]
        return result

    return prepare


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Run torch's fused attention; if beams share keys, one product serves all of them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    prompt: tuple[torch.Tensor, torch.Tensor] | None = getattr(key, "longctx_prompt", None)
    beams = query.shape[0] // (key if prompt is None else prompt[0]).shape[0]
    if beams == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    if others.get("softcap") is not None or others.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__}: softcaps and sinks are not supported with shared beams")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    folded = query.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)  # (B, H, beams * T, D), beams outside
    if prompt is None:
        out = _part(folded, key, value, _folded(attention_mask, beams, key.shape[0]), scale)[0]
        return _unfold(out, beams), None
    shared = prompt[0].shape[2]
    mask = _causal(query, shared + key.shape[2]) if attention_mask is None else attention_mask
    of_prompt = None if mask is None else _folded(mask[..., :shared], beams, prompt[0].shape[0])
    first, first_lse = _part(folded, *prompt, of_prompt, scale)
    second, second_lse = _part(query, key, value, None if mask is None else mask[..., shared:], scale)
    out, lse = _unfold(first, beams), _unfold(first_lse[..., None], beams)
    weight = torch.sigmoid(second_lse.transpose(1, 2)[..., None] - lse)  # the last token always sees itself
    return torch.lerp(out, second.transpose(1, 2), weight.to(out.dtype)), None


def _part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend few queries (B, H, N, D) to all of k, v (B, G, S, D); return out (B, H, N, D) and lse (B, H, N), fp32."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    logits = (grouped * scale) @ k[:, :, None].mT
    logits = logits.float() if logits.dtype != torch.float64 else logits
    if mask is not None:
        mask = mask[:, :, None]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    lse = torch.logsumexp(logits, -1, keepdim=True)
    p = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0))
    return (p.to(v.dtype) @ v[:, :, None]).flatten(1, 2), lse[..., 0].flatten(1, 2)


def _folded(mask: torch.Tensor | None, beams: int, rows: int) -> torch.Tensor | None:
    """Return a mask (rows or rows * beams, 1, T, S) as (rows, 1, beams * T, S), or broadcastable if T = 1."""
    if mask is None:
        return None
    mask = mask if mask.shape[0] in (1, rows) else mask[::beams]
    return mask if mask.shape[2] == 1 else mask.repeat(1, 1, beams, 1)


def _unfold(x: torch.Tensor, beams: int) -> torch.Tensor:
    """Reshape (B, H, beams * T, D) to (B * beams, T, H, D)."""
    return x.unflatten(2, (beams, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _causal(query: torch.Tensor, keys: int) -> torch.Tensor | None:
    """Return the causal mask (1, 1, T, S) of the last T tokens; None for a single token, which attends to all."""
    tokens = query.shape[2]
    if tokens == 1:
        return None
    index = torch.arange(keys, device=query.device)
    return (index[None, :] <= index[keys - tokens :, None])[None, None]

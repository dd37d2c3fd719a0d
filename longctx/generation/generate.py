"""generate(): transformers' own generate() over a context sharded over ranks.

The prompt runs through the model once, sharded, with ring attention; each rank keeps its shard of the keys and values
(under `enable_el`, of the layer inputs). Every rank then computes the same new token: ranks communicate in attention
only, D + 1 numbers per query head and layer. A layer with a bounded state needs no communication: every rank has the
state of the whole prompt. Sampling uses random generators with the same seed on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from longctx.decode.caches.sharded import ReplicatedState, ShardedCache, ShardedHidden, ShardedLayer
from longctx.decode.sharded import ContextShard
from longctx.errors import ModelError
from longctx.generation.el import el_layers, spread_source
from longctx.mesh import Mesh
from longctx.models.attach import attach_attention
from longctx.models.hook.binding import Binding, binding_of
from longctx.models.hook.bounded_layer import bounded_child
from longctx.models.modes import evaluating
from longctx.sharding import positions, shard

_OTHER_CACHES = ("cache_implementation", "prompt_lookup_num_tokens")
"""options that choose another cache; on a ring, those of the generation config are ignored"""


@torch.no_grad()
def generate(
    model: Any,
    input_ids: torch.Tensor,
    *,
    mesh: Mesh,
    layout: str = "zigzag",
    attention_mask: torch.Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Continue a prompt whose context is sharded over the ranks of ``mesh``. Collective.

    Args:
        model: a causal transformers model, replicated on every rank; on a ring its attention becomes longctx's. Or,
            under `enable_el`, an encoder-decoder: every rank runs the encoder and keeps its shard of the output.
        input_ids: (B, S) int64, the whole prompt, equal on every rank of the sequence group; S >= 2 on a ring.
        attention_mask: (B, S), 0 at padding; left padding only.
        seed: for sampling.
        options: of transformers' generate(): max_new_tokens, do_sample, num_beams, streamer, … Defaults come from the
            model's generation config.

    Returns:
        the result of transformers' generate(), equal on every rank. The train or eval mode of modules is restored.

    Raises:
        ModelError: sharded generation does not support the model or an option; see docs/decode.md.
    """
    _check(model, input_ids, attention_mask, options, mesh.sequence_size)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    beams = max(int(_option(model, options, name) or 1) for name in ("num_beams", "num_return_sequences"))
    devices = [mesh.device] if mesh.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if mesh.sequence_size == 1:
            return model.generate(input_ids, attention_mask=mask, **(options | {"use_cache": True}))
        if model.config.is_encoder_decoder:
            return _from_source(model, input_ids, mask, mesh, options)
        if binding_of(model) is None or binding_of(model).mesh is not mesh:  # type: ignore[union-attr]
            attach_attention(model, mesh, layout)
        binding = binding_of(model)
        assert binding is not None
        try:
            cache = binding.cache = _prefill(model, input_ids[:, :-1], mask[:, :-1], binding)
            if beams > 1:
                cache.batch_repeat_interleave(beams)
            own = dict.fromkeys(_OTHER_CACHES) | {"use_cache": True}
            return model.generate(input_ids, attention_mask=mask, past_key_values=cache, **(options | own))
        finally:
            binding.cache = None


def _from_source(model: Any, ids: torch.Tensor, mask: torch.Tensor, mesh: Mesh, options: dict[str, Any]) -> Any:
    """Generate from a sharded encoder output; self-attention runs unsharded on every rank."""
    from transformers.modeling_outputs import BaseModelOutput

    with spread_source(model, mesh):
        hidden = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        mine, visible = (x.tensor_split(mesh.sequence_size, 1)[mesh.sequence_rank].clone() for x in (hidden, mask))
        del hidden
        source = BaseModelOutput(last_hidden_state=mine)
        return model.generate(encoder_outputs=source, attention_mask=visible, **(options | {"use_cache": True}))


def _prefill(model: Any, ids: torch.Tensor, mask: torch.Tensor, binding: Binding) -> ShardedCache:
    """Run all but the last token of the prompt through the sharded model; each rank caches its shard."""
    length, mesh, layout = ids.shape[1], binding.mesh, binding.layout
    documents = shard(torch.where(mask > 0, 0, -1).to(torch.int32), mesh, layout=layout, pad_value=-1)
    context = ContextShard(
        mesh.sequence_rank, mesh.sequence_size, length, positions(length, mesh, layout).to(ids.device), documents
    )
    layers = _layers(model, context, mask.sum(-1))
    cache = binding.cache = ShardedCache(mesh, layers, context)
    model(
        input_ids=shard(ids, mesh, layout=layout),
        position_ids=shard((mask.cumsum(-1) - 1).clamp(min=0), mesh, layout=layout),
        document_ids=documents,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    if not cache.filled:
        raise ModelError(
            f"{type(model).__name__} did not fill its cache of {len(layers)} layers: only models whose every layer "
            "caches keys and values, or has a bounded state of longctx, support sharded generation"
        )
    cache.ready = True
    return cache


def _layers(model: Any, context: ContextShard, tokens: torch.Tensor) -> list[ShardedLayer | ReplicatedState]:
    """Return each layer's cache: a bounded state, layer inputs (EL-attention), or keys and values."""
    count = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    layers: list[ShardedLayer | ReplicatedState] = [ShardedLayer(context) for _ in range(count)]
    for index in el_layers(model):
        layers[index] = ShardedHidden(context)
    for module in model.modules():
        if bounded_child(module) is not None:
            layers[int(module.layer_idx)] = ReplicatedState(context, tokens)
    return layers


def _check(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any], ranks: int) -> None:
    name = type(model).__name__
    if not hasattr(model, "generate"):
        raise ModelError(f"{name}: sharded generation is for models with generate()")
    least = ranks if getattr(model.config, "is_encoder_decoder", False) else min(ranks, 2)
    if ids.dim() != 2 or ids.shape[1] < least or ids.is_floating_point():
        raise ModelError(
            f"input_ids {tuple(ids.shape)} of {ids.dtype}: expected (B, S) token numbers with S >= {least}"
        )
    left = not model.config.is_encoder_decoder
    if mask is not None and (mask.shape != ids.shape or left and bool((mask[:, -1] == 0).any())):
        raise ModelError(
            f"attention_mask {tuple(mask.shape)} for input_ids {tuple(ids.shape)}: give one of the same shape, for "
            "decoders with padding on the left"
        )
    for option in (*_OTHER_CACHES, "past_key_values", "assistant_model"):
        if options.get(option) is not None:
            raise ModelError(f"generate({option}=…): sharded generation uses its own cache; leave it out")
    if options.get("use_cache") is False:
        raise ModelError("generate(use_cache=False): sharded generation needs its cache; leave it out")
    if ranks > 1 and _option(model, options, "guidance_scale") not in (None, 1, 1.0):
        raise ModelError(
            "generate(guidance_scale=…): guidance reads a second prompt, which has no sharded cache; give "
            "guidance_scale=1, in the folder's generation_config.json if it is set there, or generate in one process"
        )


def _option(model: Any, options: dict[str, Any], name: str) -> Any:
    """Return the value of an option of generate(): as given, else from the model's generation config."""
    return options[name] if name in options else getattr(model.generation_config, name, None)


def same_everywhere(tokens: torch.Tensor, mesh: Mesh) -> bool:
    """Return whether all ranks of the sequence group have the same tokens. Collective."""
    if mesh.sequence_size == 1:
        return True
    low, high = tokens.clone(), tokens.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=mesh.sequence_group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=mesh.sequence_group)
    return bool(torch.equal(low, high))

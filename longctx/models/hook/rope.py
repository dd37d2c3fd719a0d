"""Rotary embeddings on a shard: use the whole sequence's length, and frequencies in fp32.

Two things are wrong when transformers' rotary modules run in a sharded, mixed-precision job:

- dynamic NTK and longrope choose their frequencies by the largest position **of this rank** and keep it, so ranks
  differ and results depend on earlier batches. Here the frequencies depend only on the largest position of the
  unsharded batch.
- casting the model to bf16 (by DeepSpeed, or ``model.bfloat16()``) also rounds the frequencies: a relative error of 2⁻⁹
  times a position of 100,000 is noise. transformers keeps them in fp32 when it loads in bf16; here they are restored.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist

from longctx.models.hook.binding import Binding, binding_of

_ROTARY = "longctx_rotary"
_NEUTRAL = "longctx"  # a rope_type that transformers' per-forward update ignores


def attach_rope(model: torch.nn.Module, binding: Binding) -> None:
    """Register forward hooks that give every rotary module of ``model`` the whole length and fp32 frequencies."""
    for module in model.modules():
        if hasattr(module, "rope_type") and _inverse_frequencies(module):
            rotary = Rotary(module, binding)
            setattr(module, _ROTARY, rotary)
            binding.handles.append(module.register_forward_pre_hook(rotary.before, with_kwargs=True))
            binding.handles.append(module.register_forward_hook(rotary.after, always_call=True))


class Rotary:
    """The hooks of one rotary module, and the fp32 frequencies that its class computes from its config."""

    def __init__(self, module: Any, binding: Binding) -> None:
        self.binding = binding
        self._read(module)

    def _read(self, module: Any) -> Any:
        """Read frequencies and RoPE types from a new module of the same config, and return it."""
        with torch.device("cpu"):
            twin = type(module)(module.config)  # a fresh copy: not partitioned, not cast
        self.frequencies = _inverse_frequencies(twin)
        module.rope_type = twin.rope_type
        kinds: dict[str | None, str] = (
            module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
        )
        self.growing = {layer: kind for layer, kind in kinds.items() if "dynamic" in kind or kind == "longrope"}
        self.kept = module.rope_type
        return twin

    def rebuild(self, module: Any) -> None:
        """Compute everything that ``module`` derived from its config again, after the config has changed."""
        twin = self._read(module)
        for name, buffer in twin.named_buffers(recurse=False):
            device = getattr(module, name).device if hasattr(module, name) else self.binding.mesh.device
            module.register_buffer(name, buffer.to(device), persistent=False)
        for name, value in vars(twin).items():
            if not name.startswith("_") and name not in ("training", "config"):
                setattr(module, name, value)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the frequencies of this forward, and prevent transformers from replacing them."""
        for name, frequencies in self.frequencies.items():
            buffer = getattr(module, name)
            if buffer.dtype != torch.float32:
                setattr(module, name, frequencies.to(buffer.device))
        position_ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        layer = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
        if layer not in self.growing or position_ids is None:
            return
        kind = self.growing[layer]
        name = "inv_freq" if layer is None else f"{layer}_inv_freq"
        length = self.true_length(position_ids)
        setattr(module, name, _frequencies(kind, module.config, length, layer))
        module.rope_type = _NEUTRAL if layer is None else {**self.kept, layer: _NEUTRAL}

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Restore the module's rope_type; called even if its forward raised."""
        module.rope_type = self.kept

    def true_length(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Return the largest position of the unsharded batch plus one, () int64, without padding. Collective."""
        ids = self.binding.document_ids
        if ids is not None and ids.shape == position_ids.shape:
            position_ids = position_ids.masked_fill(ids < 0, 0)
        length = position_ids.max() + 1
        if self.binding.sharded:
            dist.all_reduce(length, op=dist.ReduceOp.MAX, group=self.binding.mesh.sequence_group)
        return length


def _inverse_frequencies(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")}


def _frequencies(kind: str, config: Any, length: torch.Tensor, layer: str | None) -> torch.Tensor:
    """Return transformers' frequencies for ``length``, (rotated dimensions / 2,) fp32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    arguments = {} if layer is None else {"layer_type": layer}
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, length.device, seq_len=length, **arguments)
    return frequencies.to(torch.float32)


def change_rope(model: torch.nn.Module, description: Any) -> None:
    """Give an attached model the RoPE parameters and positions of another config of the same architecture, in place."""
    binding = binding_of(model)
    assert binding is not None
    for config in binding.configs:
        if getattr(config, "rope_parameters", None) is not None and hasattr(description, "rope_parameters"):
            config.rope_parameters = copy.deepcopy(description.rope_parameters)
            config.max_position_embeddings = description.max_position_embeddings
    for module in model.modules():
        rotary = getattr(module, _ROTARY, None)
        if rotary is not None:
            rotary.rebuild(module)

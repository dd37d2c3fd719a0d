"""engine.save_pretrained: write the weights of all ranks as a folder that plain transformers (or PEFT) loads.

Under ZeRO-3 a rank's parameters have no elements between steps, so ``model.save_pretrained`` of transformers and PEFT
would write empty tensors, and PEFT's merge methods would merge nothing, without an error. These methods raise instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import torch

from longctx.engine.exchange import exchange
from longctx.errors import EngineError
from longctx.mesh import Mesh

_GUARD = "longctx_refuses_empty"
_NEEDS_WHOLE = {
    "save_pretrained": "call engine.save_pretrained(folder) on every rank, which gathers them",
    "merge_and_unload": "save the adapter with engine.save_pretrained(folder), load it in one process and merge there",
    "merge_adapter": "save the adapter with engine.save_pretrained(folder), load it in one process and merge there",
}


class SavedEngine(Protocol):
    """The part of an engine that saving its model needs."""

    module: Any
    mesh: Mesh
    global_steps: int

    def zero_optimization_stage(self) -> int: ...


def save_pretrained(engine: SavedEngine, folder: str | Path, options: dict[str, Any]) -> Path:
    """Write the engine's model, or its PEFT adapters, to ``folder`` from rank 0. Collective over the world."""
    module: Any = engine.module
    path, problem = Path(folder), None
    if not callable(getattr(module, "save_pretrained", None)):
        raise EngineError(
            f"engine.save_pretrained: {type(module).__name__} is no model of transformers or PEFT and has no "
            "save_pretrained; use engine.save_checkpoint, or gather with deepspeed.zero.GatheredParameters"
        )
    exchange([], engine.mesh, "engine.save_pretrained", engine.global_steps)  # raises if ranks are elsewhere
    weights = gather_weights(engine, adapters_only=hasattr(module, "peft_config"))
    if engine.mesh.rank == 0:
        try:
            module.save_pretrained(str(path), **{**options, "state_dict": weights})
        except Exception as error:  # the other ranks wait in the exchange, so report it there
            problem = error
    everyone = exchange([int(problem is not None)], engine.mesh, "engine.save_pretrained", engine.global_steps)
    if problem is not None:
        raise EngineError(f"engine.save_pretrained({str(path)!r}): {problem}") from problem
    if everyone[0][0]:
        raise EngineError(f"engine.save_pretrained({str(path)!r}): rank 0 could not write; see its log")
    return path


def gather_weights(engine: SavedEngine, adapters_only: bool = False) -> dict[str, torch.Tensor]:
    """Return the whole model's state dict on rank 0 (CPU tensors, in forward's dtype), an empty one on other ranks.

    Collective over the world. Tied weights share one tensor. Under ZeRO-3 one module is gathered at a time.

    Args:
        adapters_only: leave out frozen weights that PEFT does not save with its adapters.
    """
    module: Any = engine.module
    adapters = _kept_with_adapters(module) if adapters_only else None
    if engine.zero_optimization_stage() < 3:
        states = module.state_dict() if engine.mesh.rank == 0 else {}
        chosen = {name: value for name, value in states.items() if adapters is None or adapters(name)}
        return _on_host(chosen)
    import deepspeed

    found: dict[str, torch.Tensor] = {}
    hosts: dict[int, torch.Tensor] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        named = {
            f"{prefix}.{name}" if prefix else name: parameter
            for name, parameter in part.named_parameters(recurse=False)
        }
        wanted = {name: p for name, p in named.items() if adapters is None or p.requires_grad or adapters(name)}
        with deepspeed.zero.GatheredParameters([p for p in wanted.values() if id(p) not in hosts]):
            for name, parameter in wanted.items():
                if id(parameter) not in hosts:
                    keep = parameter.detach().cpu().clone() if engine.mesh.rank == 0 else torch.empty(0)
                    hosts[id(parameter)] = keep
                found[name] = hosts[id(parameter)]
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer.detach().cpu()
    return found if engine.mesh.rank == 0 else {}


def _on_host(states: dict[str, Any]) -> dict[str, Any]:
    """Return copies of tensors on the CPU; tensors that share memory share it afterwards too."""
    hosts: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for value in states.values():
        if isinstance(value, torch.Tensor):
            hosts.setdefault((value.data_ptr(), value.shape), value.detach().cpu().contiguous())
    return {
        name: hosts[value.data_ptr(), value.shape] if isinstance(value, torch.Tensor) else value
        for name, value in states.items()
    }


def _kept_with_adapters(module: Any) -> Callable[[str], bool]:
    """Return a predicate on parameter names: whether PEFT may save the parameter with an adapter."""
    marks = {getattr(module.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens", "token_adapter"}
    getters = (module.get_base_model().get_input_embeddings, module.get_base_model().get_output_embeddings)
    embeddings = {id(p) for get in getters if (layer := get()) is not None for p in layer.parameters()}
    named = {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in embeddings}
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    return lambda name: name in named or name in trained or any(mark in name for mark in marks)


def refuse_empty(model: Any) -> None:
    """Make a model's own save and merge methods raise while its parameters are partitioned, in place.

    Args:
        model: of transformers or PEFT; other models have no such methods.
    """
    for part in {id(part): part for part in (model, getattr(model, "base_model", None)) if part is not None}.values():
        for name, way in _NEEDS_WHOLE.items():
            method = getattr(part, name, None)
            if callable(method) and not getattr(method, _GUARD, False):
                setattr(part, name, _guarded(part, name, method, way))


def _guarded(model: Any, name: str, method: Any, way: str) -> Any:
    @wraps(method)
    def guarded(*arguments: Any, **keywords: Any) -> Any:
        if keywords.get("state_dict") is None:
            empty = next((key for key, p in model.named_parameters() if _is_partitioned(p)), None)
            if empty is not None:
                raise EngineError(
                    f"{type(model).__name__}.{name}: ZeRO-3 has partitioned the weights ({empty} has no elements on "
                    f"this rank), so tensors of 0 elements would be used: {way}"
                )
        return method(*arguments, **keywords)

    setattr(guarded, _GUARD, True)
    return guarded


def _is_partitioned(parameter: Any) -> bool:
    return parameter.numel() == 0 and getattr(parameter, "ds_numel", 0) > 0

"""Nothing silently local: the first forward under a mesh proves that every layer that mixes tokens used longctx.

A model may accept ``attn_implementation="longctx"`` and never call it (Bloom, Mamba), or only in some layers (Jamba):
on a shard it would train on the wrong mathematics without a word. So the first forward is watched, and judged when it
ends; every rank sees the same model and raises the same error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from longctx.errors import ModelError
from longctx.models.binding import Binding
from longctx.models.wrapped import adapter_parts, inner_models

_LAYER = re.compile(r"(Layer|Block)$")
_ATTENTION = re.compile(r"Attention|Attn")
# Modules that mix tokens in a way of their own, by class name: state spaces, convolutions along the sequence,
# recurrences, and poolers that pick a token of the whole sequence.
_MIXER = re.compile(
    r"Mamba|SSM|Mixer|Rwkv|Recurrent|Recursion|DeltaNet|ShortConv|Hyena|Fourier|Retention|Lightning|MultiheadAttention"
    r"|Pooler|Pooling"
)
_PER_TOKEN = re.compile(r"(Norm|Norm2d|MLP|Mlp|FeedForward|Embeddings?|Activation|Router|Experts?|Linear|Dropout)$")
_MIXING_TYPES = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.RNNBase, torch.nn.MultiheadAttention)


def watch(model: torch.nn.Module, binding: Binding) -> None:
    """Check the keywords of every forward of ``model``, and judge its first one if the sequence is sharded."""
    binding.checked = not binding.sharded  # on one device no layer can be too local
    watcher = _Watcher(binding)
    binding.handles.append(model.register_forward_pre_hook(watcher.before, with_kwargs=True))
    binding.handles.append(model.register_forward_hook(watcher.after, always_call=True))
    for inner in inner_models(model) if binding.sharded else ():
        if inner is not model:  # what a wrapper passes on is what counts
            binding.handles.append(inner.register_forward_pre_hook(watcher.inner, with_kwargs=True))


class _Watcher:
    """The hooks on the model itself, and in its first forward the list of modules that ran."""

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self.ran: dict[int, torch.nn.Module] = {}
        self.handles: list[Any] = []

    def before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.binding.document_ids = kwargs.get("document_ids")
        if self.binding.sharded:
            check_keywords(model, kwargs, self.binding.cache)
        if not self.binding.checked:
            self._stop()
            self.ran.clear()
            self.binding.called.clear()
            for module in model.modules():
                if module is not model:
                    self.handles.append(module.register_forward_hook(self._note))

    def inner(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_keywords(model, kwargs, self.binding.cache)

    def after(self, model: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.binding.checked:
            return
        self._stop()
        if output is None:  # the forward raised: what it says matters more than what we would
            return
        judge(model, self.ran, self.binding.called)
        self.binding.checked = True
        self.ran.clear()

    def _note(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.ran[id(module)] = module

    def _stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def check_keywords(model: torch.nn.Module, kwargs: dict[str, Any], cache: Any = None) -> None:
    """Refuse keywords whose meaning is local to a shard, before anything is computed or sent.

    Args:
        cache: of the sharded generation in progress, whose forwards are in order.
    """
    if cache is not None and kwargs.get("past_key_values") is cache:
        return
    name = type(model).__name__
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        raise ModelError(
            f"{name} was called with a cache on a shard; pass use_cache=False, or generate with longctx.generate"
        )
    keep = kwargs.get("logits_to_keep", 0)
    if isinstance(keep, torch.Tensor) or keep:
        raise ModelError(f"{name}: logits_to_keep picks among the local tokens of a shard; leave it out")
    loss = getattr(model, "loss_type", None)
    shifts = loss == "ForCausalLM" or name.endswith(("ForCausalLM", "LMHeadModel"))
    if shifts and kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
        raise ModelError(
            f"{name} got labels without shift_labels on a shard: it would shift them locally and lose a token at every "
            "border. Shift before sharding and pass both, as engine.shard does"
        )


def judge(model: torch.nn.Module, ran: dict[int, torch.nn.Module], called: set[int]) -> None:
    """Raise ModelError naming the class of a module that ran, mixes tokens and did not go through longctx.

    Args:
        ran: by id, the modules whose forward ran.
        called: ids of the modules that called longctx's attention function.
    """
    reached = {id(module) for module in model.modules() if any(id(child) in called for child in module.modules())}
    used = reached | {id(child) for module in model.modules() if id(module) in called for child in module.modules()}
    adapters = adapter_parts(model)
    suspects: list[tuple[str, str, str]] = []
    for path, module in model.named_modules():
        name = type(module).__name__
        if id(module) not in ran or id(module) in called | adapters or _PER_TOKEN.search(name):
            continue
        if _MIXER.search(name) or _convolves(module):
            suspects.append((path, name, "mixes tokens in a way that longctx does not shard"))
        elif _ATTENTION.search(name) and id(module) not in used and any(True for _ in module.children()):
            suspects.append((path, name, "attends without calling the attention function it was given"))
    for path, name, what in suspects:
        if not any(other.startswith(path + ".") for other, _, _ in suspects):  # the innermost says it best
            _raise(model, path, name, what)
    for path, layer in _layers(model):
        if id(layer) in ran and id(layer) not in reached | adapters:
            inner = sorted({type(child).__name__ for child in layer.children()})
            _raise(model, path, type(layer).__name__, f"never called longctx's attention (it holds {', '.join(inner)})")
    if not called:
        _raise(model, "", type(model).__name__, "never called longctx's attention")


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the members of every stack of layers."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
            for key, child in module.named_children():
                if _LAYER.search(type(child).__name__):
                    yield f"{path}.{key}", child


def _convolves(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
        return any(size != 1 for size in module.kernel_size)
    return isinstance(module, _MIXING_TYPES)


def _raise(model: torch.nn.Module, path: str, name: str, what: str) -> None:
    where = f" ({path})" if path else ""
    raise ModelError(
        f"{type(model).__name__} cannot run on a shard: {name}{where} {what}. On a shard its result would be silently "
        "wrong; use a model whose every layer attends through transformers' attention interface (docs/models.md)"
    )

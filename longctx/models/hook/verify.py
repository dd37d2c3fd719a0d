"""Nothing silently local: the first forward under a mesh proves that every layer that mixes tokens used longctx.

A model may accept ``attn_implementation="longctx"`` and never call it (Bloom, Mamba), or only in some layers (Jamba):
on a shard it would train on the wrong mathematics without a word. So the first forward is watched, and judged when it
ends; every rank sees the same model and raises the same error.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from longctx.errors import ModelError
from longctx.models.hook.binding import Binding
from longctx.models.hook.wrapped import adapter_parts, inner_models
from longctx.models.register import NAME

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


class Trace:
    """What ran in one forward: use it as a context around the call.

    Attributes:
        ran: by id, the modules whose forward ran to its end.
        inside: the innermost module that did not (it raised), with its path.
        first: the innermost first module that gave the tokens of a row different values although its own were equal;
            looked for where ``tokens`` is given.
    """

    def __init__(self, model: torch.nn.Module, tokens: int | None = None) -> None:
        self.model, self.tokens = model, tokens
        self.ran: dict[int, torch.nn.Module] = {}
        self.inside = self.first = ""
        self._open: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Trace:
        for path, module in self.model.named_modules():
            if module is self.model:
                continue
            if self.tokens is not None:
                label = f"{type(module).__name__} ({path})"
                self._handles.append(module.register_forward_pre_hook(partial(self._begin, label)))
                self._handles.append(module.register_forward_hook(partial(self._end, label), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._note))
        return self

    def __exit__(self, *_: Any) -> None:
        self.inside = self._open[-1] if self._open else ""
        self.stop()

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.ran[id(module)] = module

    def _begin(self, label: str, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self._open.append(label)

    def _end(self, label: str, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self._open.remove(label)
        given = [*args, *kwargs.values()]
        if not self.first and self._unequal(output) and not any(self._unequal(x) for x in given):
            self.first = label

    def _unequal(self, x: Any) -> bool:
        """Tell whether the tokens of a (B, T, …) or (T, D) floating tensor differ, or those of one in a tuple."""
        if isinstance(x, tuple | list):
            return any(self._unequal(part) for part in x)
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() < 2:
            return False
        x = x[None] if x.dim() == 2 else x
        if x.shape[1] != self.tokens:
            return False
        return float((x - x[:, :1]).abs().max()) > 1e-2 * float(x.abs().max())


class _Watcher:
    """The hooks on the model itself, and in its first forward the list of modules that ran."""

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self.trace: Trace | None = None

    def before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        binding = self.binding
        if binding.seen is not None:
            return
        binding.document_ids = kwargs.get("document_ids")
        check_attention(model, binding)
        if binding.sharded:
            arguments = named(model, args, kwargs)
            check_keywords(model, arguments, binding.cache)
            refuse_added_loss(type(model).__name__, arguments, binding.configs)
        if not binding.checked:
            from longctx.models.hook.probe import position_rule

            position_rule(model, binding)
            if self.trace is not None:  # of a forward that raised
                self.trace.stop()
            binding.called.clear()
            self.trace = Trace(model)
            self.trace.__enter__()

    def inner(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.binding.seen is None:
            arguments = named(model, args, kwargs)
            check_keywords(model, arguments, self.binding.cache)
            refuse_added_loss(type(model).__name__, arguments, self.binding.configs)

    def after(self, model: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.binding.checked or self.binding.seen is not None or self.trace is None:
            return
        self.trace.stop()
        if output is None:  # the forward raised: what it says matters more than what we would
            return
        judge(model, self.trace.ran, self.binding.called)
        self.binding.checked = True
        self.trace = None


def named(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, those given by place too."""
    if not args:
        return kwargs
    names = [name for name in inspect.signature(model.forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_attention(model: torch.nn.Module, binding: Binding) -> None:
    """Refuse a model whose attention was changed after it was attached."""
    for config in binding.configs:
        chosen = getattr(config, "_attn_implementation", NAME)
        if binding.sharded and chosen != NAME:
            raise ModelError(
                f"{type(model).__name__} was attached to a mesh, and its attn_implementation has been set to "
                f"{chosen!r} since: a shard would attend to itself only. Set it to {NAME!r} again, or attach it again"
            )


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


def refuse_added_loss(name: str, arguments: dict[str, Any], configs: list[Any]) -> None:
    """Refuse a load-balancing loss: that of local tokens is not that of the whole sequence, nor weighted as one.

    Args:
        arguments: of the call, by name; they win over the configs.
        configs: of the model, as they are now.

    Raises:
        ModelError: ``output_router_logits`` is on, in the call or in a config.
    """
    asked = arguments.get("output_router_logits")
    if asked or (asked is None and any(getattr(config, "output_router_logits", False) for config in configs)):
        raise ModelError(
            f"{name}: output_router_logits=True adds a load-balancing loss over the tokens of one rank and one "
            "micro-batch, which is not that of the whole batch; set output_router_logits=False"
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

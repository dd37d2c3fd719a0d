"""Record which modules run in a forward pass, and raise if one that mixes tokens did not go through longctx."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from longctx.errors import ModelError
from longctx.models.hook.wrapped import adapter_parts

_LAYER = re.compile(r"(Layer|Block)$")
_ATTENTION = re.compile(r"Attention|Attn")
# Class names of modules that mix tokens other than by attention: state spaces, convolutions along the sequence,
# recurrences, and poolers, which select a token of the whole sequence.
_MIXER = re.compile(
    r"Mamba|SSM|Mixer|Rwkv|Recurrent|Recursion|DeltaNet|ShortConv|Hyena|Fourier|Retention|Lightning|MultiheadAttention"
    r"|Pooler|Pooling"
)
_PER_TOKEN = re.compile(r"(Norm|Norm2d|MLP|Mlp|FeedForward|Embeddings?|Activation|Router|Experts?|Linear|Dropout)$")
_MIXING_TYPES = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.RNNBase, torch.nn.MultiheadAttention)


class Trace:
    """Record the modules that run in one forward pass; use it as a context manager around the call.

    Args:
        tokens: per row, in a forward with equal tokens: also find the module that first makes them differ (``first``).

    Attributes:
        ran: modules whose forward completed, by id.
        inside: the innermost module that raised, with its path.
        first: the first module, innermost, whose output differs between tokens although its inputs do not.
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
        """Return whether the tokens of a (B, T, …) or (T, D) floating tensor, or of one in a tuple, differ."""
        if isinstance(x, tuple | list):
            return any(self._unequal(part) for part in x)
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() < 2:
            return False
        x = x[None] if x.dim() == 2 else x
        if x.shape[1] != self.tokens:
            return False
        return float((x - x[:, :1]).abs().max()) > 1e-2 * float(x.abs().max())


def judge(model: torch.nn.Module, ran: dict[int, torch.nn.Module], called: set[int]) -> None:
    """Raise ModelError with the class of a module that ran, mixes tokens and did not call longctx's attention.

    Args:
        ran: modules whose forward ran, by id.
        called: ids of the modules that called longctx's attention function.
    """
    # reached: modules that contain a caller. used: also everything inside of a caller or of its parents.
    reached = {id(module) for module in model.modules() if any(id(child) in called for child in module.modules())}
    used = reached | {id(child) for module in model.modules() if id(module) in called for child in module.modules()}
    adapters = adapter_parts(model)
    suspects: list[tuple[str, str, str]] = []
    for path, module in model.named_modules():
        name = type(module).__name__
        ours = type(module).__module__.startswith("longctx.")  # the mixer of a bounded layer, which its attention calls
        if ours or id(module) not in ran or id(module) in called | adapters or _PER_TOKEN.search(name):
            continue
        if _MIXER.search(name) or _convolves(module):
            suspects.append((path, name, "mixes tokens in a way that longctx does not shard"))
        elif _ATTENTION.search(name) and id(module) not in used and any(True for _ in module.children()):
            suspects.append((path, name, "attends without calling the attention function it was given"))
    for path, name, what in suspects:
        if not any(other.startswith(path + ".") for other, _, _ in suspects):  # report the innermost suspect
            _raise(model, path, name, what)
    # A layer without any suspect inside must still have called longctx (its attention may have an unknown class name).
    for path, layer in _layers(model):
        if id(layer) in ran and id(layer) not in reached | adapters:
            inner = sorted({type(child).__name__ for child in layer.children()})
            _raise(model, path, type(layer).__name__, f"never called longctx's attention (it holds {', '.join(inner)})")
    if not called:
        _raise(model, "", type(model).__name__, "never called longctx's attention")


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (path, layer) of every ModuleList or ModuleDict of layers."""
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

"""The first sharded forward verifies that every token-mixing layer uses longctx.

A model may accept ``attn_implementation="longctx"`` and never call it (Bloom, Mamba), or only in some layers (Jamba);
on a shard it would then train wrongly without an error. So the first forward pass is recorded and checked when it ends.
Every rank has the same model and raises the same error.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from longctx.errors import ModelError
from longctx.models.hook.binding import Binding
from longctx.models.hook.position_probe import position_rule
from longctx.models.hook.trace import Trace, judge
from longctx.models.hook.wrapped import inner_models
from longctx.models.names import NAME


def watch(model: torch.nn.Module, binding: Binding) -> None:
    """Register hooks that check the keywords of every forward and, if ``model`` is sharded, verify the first one."""
    binding.checked = not binding.sharded  # on one device every layer has the whole sequence
    watcher = _Watcher(binding)
    binding.handles.append(model.register_forward_pre_hook(watcher.before, with_kwargs=True))
    binding.handles.append(model.register_forward_hook(watcher.after, always_call=True))
    for inner in inner_models(model) if binding.sharded else ():
        if inner is not model:  # a wrapper may change the keywords that it passes on
            binding.handles.append(inner.register_forward_pre_hook(watcher.inner, with_kwargs=True))


class _Watcher:
    """Forward hooks of one model, with the trace of its first forward pass."""

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self.trace: Trace | None = None

    def before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        binding = self.binding
        if binding.probe_records is not None:  # the probe's own forward
            return
        binding.document_ids = kwargs.get("document_ids")
        check_attention(model, binding)
        if binding.sharded:
            arguments = named(model, args, kwargs)
            check_keywords(model, arguments, binding.cache)
            refuse_added_loss(type(model).__name__, arguments, binding.configs)
        if not binding.checked:
            position_rule(model, binding)  # runs the model, so before the trace starts
            if self.trace is not None:  # of an earlier forward that raised
                self.trace.stop()
            binding.called.clear()  # filled by the attention function
            self.trace = Trace(model)
            self.trace.__enter__()

    def inner(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.binding.probe_records is None:
            arguments = named(model, args, kwargs)
            check_keywords(model, arguments, self.binding.cache)
            refuse_added_loss(type(model).__name__, arguments, self.binding.configs)

    def after(self, model: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.binding.checked or self.binding.probe_records is not None or self.trace is None:
            return
        self.trace.stop()
        if output is None:  # the forward raised, and its own error is the one to report
            return
        judge(model, self.trace.ran, self.binding.called)
        self.binding.checked = True
        self.trace = None


def named(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, positional ones included."""
    if not args:
        return kwargs
    names = [name for name in inspect.signature(model.forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_attention(model: torch.nn.Module, binding: Binding) -> None:
    """Raise if the attention implementation was changed after the model was attached."""
    for config in binding.configs:
        chosen = getattr(config, "_attn_implementation", NAME)
        if binding.sharded and chosen != NAME:
            raise ModelError(
                f"{type(model).__name__} was attached to a mesh, and its attn_implementation has been set to "
                f"{chosen!r} since: a shard would attend to itself only. Set it to {NAME!r} again, or attach it again"
            )


def check_keywords(model: torch.nn.Module, kwargs: dict[str, Any], cache: Any = None) -> None:
    """Raise for keywords that would act on the local shard only, before anything is computed or sent.

    Args:
        cache: of the current sharded generation; forwards with it are allowed.
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
            "shard boundary. Shift before sharding and pass both, as engine.shard does"
        )


def refuse_added_loss(name: str, arguments: dict[str, Any], configs: list[Any]) -> None:
    """Raise for a load-balancing loss: over local tokens it differs from that of the whole batch.

    Args:
        arguments: of the call, by name; they override the configs.
        configs: of the model.

    Raises:
        ModelError: ``output_router_logits`` is on, in the call or in a config.
    """
    asked = arguments.get("output_router_logits")
    if asked or (asked is None and any(getattr(config, "output_router_logits", False) for config in configs)):
        raise ModelError(
            f"{name}: output_router_logits=True adds a load-balancing loss over the tokens of one rank and one "
            "micro-batch, which differs from that of the whole batch; set output_router_logits=False"
        )

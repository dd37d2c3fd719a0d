"""Rules of the sections `train:`, `memory:` and `fp16:`."""

from __future__ import annotations

from collections.abc import Iterator

from longctx.config.fields import changed
from longctx.config.findings import Finding, Rule
from longctx.config.problems import show
from longctx.config.schema import RunConfig

_OF_ANOTHER_OPTIMIZER = {"adamw": {"momentum"}, "sgd": {"betas", "eps"}}


def _betas(config: RunConfig) -> Iterator[Finding]:
    betas = config.train.betas
    if not all(0 <= beta < 1 for beta in betas):
        yield Finding("train.betas", f"got {show(betas)}; each is at least 0 and below 1", "out-of-range")


def _warmup(config: RunConfig) -> Iterator[Finding]:
    train = config.train
    if train.warmup_steps > train.steps:
        message = f"got {train.warmup_steps}, more than train.steps {train.steps}; lower it"
        yield Finding("train.warmup_steps", message, "schedule")


def _optimizer(config: RunConfig) -> Iterator[Finding]:
    train = config.train
    for name in sorted(_OF_ANOTHER_OPTIMIZER[train.optimizer] & changed(train)):
        yield Finding(f"train.{name}", f"has no effect with optimizer {train.optimizer}; remove the key", "idle-key")


def _schedule(config: RunConfig) -> Iterator[Finding]:
    if config.train.schedule == "constant" and "min_lr_ratio" in changed(config.train):
        yield Finding("train.min_lr_ratio", "has no effect with schedule constant; remove the key", "idle-key")


def _z_loss(config: RunConfig) -> Iterator[Finding]:
    if config.memory.z_loss and config.memory.loss_tile == "none":
        message = "needs a tiled loss; set memory.loss_tile to auto, or remove the key"
        yield Finding("memory.z_loss", message, "conflict")


def _loss_backend(config: RunConfig) -> Iterator[Finding]:
    if config.memory.loss_tile == "none" and "loss_backend" in config.memory.model_fields_set:
        yield Finding("memory.loss_backend", "has no effect without a tiled loss; remove the key", "idle-key")


def _offloaded_checkpoints(config: RunConfig) -> Iterator[Finding]:
    memory = config.memory
    if memory.offload_checkpoints and memory.recompute in ("none", "mlp"):
        message = f"memory.recompute {memory.recompute} saves no checkpoints; choose layer_keep_attention"
        yield Finding("memory.offload_checkpoints", message, "conflict")


def _loss_scale_without_fp16(config: RunConfig) -> Iterator[Finding]:
    if config.model.dtype == "fp16":
        return
    for name in sorted(changed(config.fp16)):
        message = f"has no effect with model.dtype {config.model.dtype}; remove the key, or use fp16"
        yield Finding(f"fp16.{name}", message, "idle-key")


def _static_loss_scale(config: RunConfig) -> Iterator[Finding]:
    if config.model.dtype == "fp16" and config.fp16.static_scale is not None:
        for name in sorted(changed(config.fp16) - {"static_scale"}):
            yield Finding(f"fp16.{name}", "has no effect with fp16.static_scale; remove one of them", "idle-key")


def _smallest_loss_scale(config: RunConfig) -> Iterator[Finding]:
    fp16 = config.fp16
    if config.model.dtype == "fp16" and fp16.static_scale is None and fp16.min_scale > 2**fp16.scale_power:
        message = f"got {fp16.min_scale}, above the initial scale 2^{fp16.scale_power}; lower it"
        yield Finding("fp16.min_scale", message, "out-of-range")


def _hysteresis(config: RunConfig) -> Iterator[Finding]:
    if config.model.dtype == "fp16" and config.zero.stage == 0 and "hysteresis" in changed(config.fp16):
        message = "has no effect at zero.stage 0, which lowers the scale at each overflow; remove the key"
        yield Finding("fp16.hysteresis", message, "zero-stage")


RULES: tuple[Rule, ...] = (
    _betas,
    _warmup,
    _optimizer,
    _schedule,
    _z_loss,
    _loss_backend,
    _offloaded_checkpoints,
    _loss_scale_without_fp16,
    _static_loss_scale,
    _smallest_loss_scale,
    _hysteresis,
)

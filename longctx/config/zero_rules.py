"""Rules of the `zero:` section and of the raw `deepspeed:` block."""

from __future__ import annotations

from collections.abc import Iterator

from longctx.config.deepspeed import conflicts
from longctx.config.fields import changed
from longctx.config.findings import Finding, Rule
from longctx.config.schema import RunConfig
from longctx.engine.settings import load_settings
from longctx.errors import LongctxError
from longctx.mesh import Mesh


def _parameters(config: RunConfig) -> Iterator[Finding]:
    zero = config.zero
    if zero.offload_parameters != "none" and zero.stage != 3:
        message = f"got 'cpu', but stage {zero.stage} does not shard parameters; use zero.stage 3"
        yield Finding("zero.offload_parameters", message, "zero-stage")


def _group(config: RunConfig) -> Iterator[Finding]:
    zero = config.zero
    if isinstance(zero.group, int) and zero.stage != 3:
        message = f"got {zero.group}, but stage {zero.stage} does not shard weights; use zero.stage 3, or remove the "
        yield Finding("zero.group", message + "key", "zero-stage")


def _offload_at_stage_0(config: RunConfig) -> Iterator[Finding]:
    if config.zero.stage == 0 and config.zero.offload_optimizer == "cpu":
        message = "got 'cpu', but stage 0 shards no optimizer state to offload; use zero.stage 1, 2 or 3"
        yield Finding("zero.offload_optimizer", message, "zero-stage")


def _keys_at_stage_0(config: RunConfig) -> Iterator[Finding]:
    if config.zero.stage > 0:
        return
    for name in ("overlap_comm", "reduce_scatter", "contiguous_gradients"):
        if name in changed(config.zero):
            message = "has no effect at zero.stage 0; remove the key, or use 1, 2 or 3"
            yield Finding(f"zero.{name}", message, "zero-stage")


def _nvme_folder(config: RunConfig) -> Iterator[Finding]:
    zero = config.zero
    if zero.offload_optimizer != "nvme" and zero.nvme_folder is not None:
        message = "has no effect without zero.offload_optimizer: nvme; remove the key"
        yield Finding("zero.nvme_folder", message, "idle-key")
    if zero.offload_optimizer == "nvme" and zero.nvme_folder is None:
        message = "is missing; zero.offload_optimizer: nvme needs a folder on every host's NVMe disk"
        yield Finding("zero.nvme_folder", message, "missing")


def _nvme_stage(config: RunConfig) -> Iterator[Finding]:
    zero = config.zero
    if zero.offload_optimizer == "nvme" and zero.stage != 3:
        message = f"got 'nvme', which DeepSpeed treats as cpu at stage {zero.stage}; use zero.stage 3, or cpu"
        yield Finding("zero.offload_optimizer", message, "zero-stage")


def _nvme_optimizer(config: RunConfig) -> Iterator[Finding]:
    optimizer = config.train.optimizer
    if config.zero.offload_optimizer == "nvme" and optimizer != "adamw":
        message = f"got 'nvme', which is verified with adamw only, not {optimizer}; use cpu"
        yield Finding("zero.offload_optimizer", message, "conflict")


def _conflicts(config: RunConfig) -> Iterator[Finding]:
    for key, message in conflicts(config):
        yield Finding(f"deepspeed.{key}", message, "conflict")


def _features(config: RunConfig) -> Iterator[Finding]:
    """Report misspelt keys and features that a sharded sequence does not support, key by key, as the engine would.

    Keys that depend on the mesh belong to one of our sections; `conflicts` reports them.
    """
    refused = {key.partition(".")[0] for key, _ in conflicts(config)}
    single = Mesh(world_size=1, rank=0)
    for key, value in config.deepspeed.items():
        if key not in refused:
            try:
                load_settings({key: value}, single)
            except LongctxError as error:
                yield Finding(f"deepspeed.{key}", str(error), "deepspeed")


RULES: tuple[Rule, ...] = (
    _parameters,
    _group,
    _offload_at_stage_0,
    _keys_at_stage_0,
    _nvme_folder,
    _nvme_stage,
    _nvme_optimizer,
    _conflicts,
    _features,
)

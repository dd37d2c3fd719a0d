"""Build DeepSpeed's configuration from our sections, and reject what the raw `deepspeed:` block must not set."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from longctx.config.derived import Derived, derive
from longctx.config.nvme import SUB_GROUP, run_folder
from longctx.config.schema import RunConfig

OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "gradient_clipping": "train.clip",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "sequence_parallel_size": "mesh.ring",
    "data_parallel_size": "mesh.data",
    "seed": "train.seed",
    "tensorboard": "output.tensorboard",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.zero_hpz_partition_size": "zero.group",
    "zero_optimization.offload_optimizer": "zero.offload_optimizer",
    "zero_optimization.cpu_offload": "zero.offload_optimizer",
    "zero_optimization.offload_param": "zero.offload_parameters",
    "zero_optimization.cpu_offload_param": "zero.offload_parameters",
    "zero_optimization.overlap_comm": "zero.overlap_comm",
    "zero_optimization.reduce_scatter": "zero.reduce_scatter",
    "zero_optimization.contiguous_gradients": "zero.contiguous_gradients",
}
"""DeepSpeed's key -> the key of ours that owns it"""

REFUSED = {
    "amp": "use model.dtype",
    "torch_autocast": "use model.dtype",
    "zero_allow_untested_optimizer": "the optimizer is ours; remove the key",
    "zero_force_ds_cpu_optimizer": "the optimizer is ours; remove the key",
    "prescale_gradients": "gradients are scaled by the engine, once; remove the key",
    "gradient_predivide_factor": "gradients are scaled by the engine, once; remove the key",
    "elasticity": "it changes the batch that train.global_batch sets; remove the key",
    "checkpoint": "checkpoints are written by longctx; use the section checkpoint",
    "load_universal_checkpoint": "checkpoints are read by longctx; use the section checkpoint",
    "pipeline": "there is no pipeline axis; remove the key",
    "compression_training": "it is not supported; remove the key",
    "zero_optimization.mics_shard_size": "DeepSpeed no longer has MiCS; remove the key, or use zero.group",
    "zero_optimization.mics_hierarchical_params_gather": "DeepSpeed no longer has MiCS; remove the key",
    "zero_optimization.zero_quantized_weights": "it is not supported; remove the key",
    "zero_optimization.zero_quantized_nontrainable_weights": "it is not supported; remove the key",
    "zero_optimization.zero_quantized_gradients": "it is not supported; remove the key",
}
"""DeepSpeed's key -> why the raw block must not set it, and what to do"""


def conflicts(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (dotted key below `deepspeed`, message) for each key that the raw block must not set."""
    for key, value in _walk(config.deepspeed):
        if key in OWNED:
            yield key, f"conflicts with {OWNED[key]}, which owns this setting; remove it here and set {OWNED[key]}"
        elif key in REFUSED:
            yield key, REFUSED[key]
        elif value == "auto":
            yield key, "got 'auto', which only other tools fill in; write the value or remove the key"
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield "zero_optimization", "expected a block of keys"


def _walk(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in block.items():
        key = f"{prefix}{name}"
        yield key, value
        if isinstance(value, dict) and key not in OWNED and key not in REFUSED:
            yield from _walk(value, f"{key}.")


def to_deepspeed(config: RunConfig, derived: Derived | None = None) -> dict[str, Any]:
    """Return the dictionary for ``longctx.initialize(config=…)``; the optimizer object is passed separately.

    Args:
        config: a valid configuration.
        derived: its sizes; None: derived for the current world.
    """
    derived = derived or derive(config)
    zero, train = config.zero, config.train
    sharding: dict[str, Any] = {"stage": zero.stage}
    if zero.stage > 0:
        sharding |= {
            "overlap_comm": zero.overlap_comm,
            "reduce_scatter": zero.reduce_scatter,
            "contiguous_gradients": zero.contiguous_gradients,
        }
    if derived.group is not None:
        sharding["zero_hpz_partition_size"] = derived.group
    if zero.offload_optimizer == "cpu":
        sharding["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_optimizer == "nvme":
        sharding["offload_optimizer"] = {"device": "nvme", "nvme_path": str(run_folder(config))}
        sharding["sub_group_size"] = SUB_GROUP
    if zero.offload_parameters == "cpu":
        sharding["offload_param"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_batch_size": derived.global_batch,
        "train_micro_batch_size_per_gpu": derived.micro_batch,
        "gradient_accumulation_steps": derived.accumulation,
        "gradient_clipping": train.clip or 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,  # a torch optimizer: DeepSpeed compiles none of its own
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": sharding,
    }
    if config.model.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    if config.model.dtype == "fp16":
        settings["fp16"] = _loss_scale(config)
    return _merged(settings, copy.deepcopy(config.deepspeed))


def _loss_scale(config: RunConfig) -> dict[str, Any]:
    fp16 = config.fp16
    return {
        "enabled": True,
        "loss_scale": fp16.static_scale or 0,
        "initial_scale_power": fp16.scale_power,
        "loss_scale_window": fp16.window,
        "hysteresis": fp16.hysteresis,
        "min_loss_scale": fp16.min_scale,
    }


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    for key, value in theirs.items():
        ours[key] = _merged(ours[key], value) if isinstance(value, dict) and isinstance(ours.get(key), dict) else value
    return ours

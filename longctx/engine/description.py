"""Describe what an engine trains as named strings, which must be equal on all ranks."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from longctx.engine.settings import Settings
from longctx.sameness import code_and_packages, flatten

_OWN = (  # sections that may differ between ranks: logging, monitoring and profiling
    "tensorboard wandb csv_monitor comet monitor flops_profiler comms_logger steps_per_print wall_clock_breakdown "
    "memory_breakdown dump_state log_level autotuning aio nebula datastates_ckpt disable_python_gc timers"
).split()
_FOLDERS = ("zero_optimization.offload_optimizer.nvme_path", "zero_optimization.offload_param.nvme_path")
# The model's path, which may differ between hosts, and what save_pretrained writes into the config of the saving rank.
# Dtypes are compared per weight instead.
_LEFT_OUT = frozenset("_name_or_path name_or_path transformers_version architectures dtype torch_dtype".split())


def describe(
    model: Any, settings: Settings, layout: str, seed: int, *, optimizer: Any = None, **more: Any
) -> dict[str, str]:
    """Return what must be equal on all ranks before the first step, by name.

    Args:
        settings: DeepSpeed's configuration, checked.
        layout: of the rows over the ring.
        seed: of the sample order and of attention dropout.
        optimizer: a torch optimizer, if the caller made one.
        more: further values by name.
    """
    flat = flatten({key: value for key, value in settings.items() if key not in _OWN}, "config")
    facts = {key: value for key, value in flat.items() if key.removeprefix("config.") not in _FOLDERS}
    facts |= {"layout": layout, "seed": str(seed), **{key: str(value) for key, value in more.items()}}
    facts |= code_and_packages()
    facts["model class"] = type(model).__name__
    facts["model weights (names, shapes, dtypes, trained or frozen)"] = _digest(
        [(name, tuple(getattr(p, "ds_shape", p.shape)), str(p.dtype), p.requires_grad) for name, p in _weights(model)]
    )
    facts |= describe_config(getattr(model, "config", None))
    if optimizer is not None and hasattr(optimizer, "param_groups"):
        facts["optimizer"] = type(optimizer).__name__
        for index, group in enumerate(optimizer.param_groups):
            numbers = {key: value for key, value in group.items() if key != "params"}
            facts |= flatten(numbers, f"optimizer.param_groups[{index}]")
    return facts


def describe_config(config: Any) -> dict[str, str]:
    """Return a transformers config as named strings, without its path; {} for any other object."""
    if not hasattr(config, "to_dict"):
        return {}
    flat = flatten(config.to_dict(), "model.config")
    return {key: value for key, value in flat.items() if key.rpartition(".")[2] not in _LEFT_OUT}


def _weights(model: Any) -> list[tuple[str, Any]]:
    return list(model.named_parameters()) if hasattr(model, "named_parameters") else []


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

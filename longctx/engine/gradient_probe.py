"""Measure by what DeepSpeed divides gradients, with a tiny model and the run's own settings.

DeepSpeed's stages differ: most average over world / sequence_parallel_size ranks, ZeRO-3's default reduce_scatter path
over the world. Instead of guessing which path a version and its options take, a model of 22 weights takes one step of
plain SGD from zero at a learning rate of 1; its weights then equal the negative gradients.
"""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import torch

from longctx.engine.exchange import exchange
from longctx.engine.global_mpu import only_mpu
from longctx.engine.settings import Settings
from longctx.engine.zero import fp16, guard
from longctx.engine.zero.hpz import own_group
from longctx.errors import EngineError
from longctx.mesh import Mesh

logger = logging.getLogger(__name__)

_IRRELEVANT = (  # sections that take time or write files, and do not affect gradients
    "optimizer scheduler gradient_clipping tensorboard wandb csv_monitor comet monitor flops_profiler comms_logger "
    "checkpoint nebula datastates_ckpt activation_checkpointing wall_clock_breakdown memory_breakdown dump_state "
    "autotuning elasticity compile progressive_layer_drop eigenvalue compression_training"
).split()
_SMALL = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"), 4096)
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_SCALE = 0.375  # loss scale of the probe in fp16: not the size of any mesh, and exact in fp16
_known: dict[str, float] = {}


def gradient_factor(settings: Settings, mesh: Mesh, mpu: Any) -> float:
    """Return the factor by which ``engine.backward`` must multiply losses to get the true gradients.

    Collective over the world; takes less than a second; cached per settings and mesh.

    Args:
        settings: DeepSpeed's configuration, checked (``settings.load_settings``).
        mesh: the grid; gradients are to be averaged over its data_size.
        mpu: the engine's mpu, normally the mesh.

    Raises:
        EngineError: on every rank, if gradients differ between ranks, are not a constant multiple of the true ones, or
            do not have the reported norm.
    """
    small = probe_settings(settings)
    key = json.dumps([small, mesh.ring_size, mesh.ulysses_size, mesh.data_size, type(mpu).__qualname__], sort_keys=True)
    if key not in _known:
        _known[key] = _measure(small, mesh, mpu)
        stage = small.get("zero_optimization", {}).get("stage", 0)
        if _known[key] != 1.0 and mesh.rank == 0:
            logger.warning(
                "DeepSpeed's ZeRO-%s path divides gradients by %g times too much here (sequence over %d ranks, %d data "
                "replicas): engine.backward multiplies by %g. Reported losses are not touched.",
                stage, _known[key], mesh.sequence_size, mesh.data_size, _known[key],
            )  # fmt: skip
    return _known[key]


def probe_settings(settings: Settings) -> Settings:
    """Return the settings of the probe's engine: the run's own stage, dtype, offload and reduction path, with small
    buffers and without learning-rate schedule, clipping, monitors or NVMe files."""
    small = copy.deepcopy({key: value for key, value in settings.items() if key not in _IRRELEVANT})
    small.update(zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
    small.update(gradient_clipping=0.0, steps_per_print=2**31)
    zero = small.get("zero_optimization") or {}
    if zero:
        zero.update(_SMALL)  # DeepSpeed allocates whole buckets: gigabytes at the default sizes
    for part in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(part), dict) and zero[part].get("device") == "nvme":
            zero[part] = {"device": "cpu"}
    if isinstance(small.get("fp16"), dict):
        # Static; a result that is off by it shows that it was misapplied.
        small["fp16"] = {**small["fp16"], "loss_scale": _SCALE}
    return small


class _ProbeModel(torch.nn.Module):
    """Zero weights, and a loss whose gradient is ``scale`` times a fixed pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.zeros(3, 5))
        self.vector = torch.nn.Parameter(torch.zeros(7))

    def forward(self, scale: float) -> torch.Tensor:
        total = torch.zeros((), device=self.vector.device)
        for weight in (self.matrix, self.vector):
            total = total + (weight.float() * scale * _pattern(weight)).sum()
        return total


def _pattern(weight: torch.Tensor) -> torch.Tensor:
    return torch.arange(1, weight.numel() + 1, device=weight.device, dtype=torch.float32).reshape(weight.shape)


def _contribution(rank: int, micro_batch: int) -> float:
    return 1.0 + rank % 3 + 2 * (micro_batch % 2)  # differs between neighbours; exact in bf16


def _measure(settings: Settings, mesh: Mesh, mpu: Any) -> float:
    import deepspeed

    model = _ProbeModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with own_group(settings), only_mpu(mpu):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(settings), mpu=mpu)
    guard.correct_optimizer(engine)
    try:
        micro_batches = engine.gradient_accumulation_steps()
        for micro_batch in range(micro_batches):
            loss = engine(_contribution(mesh.rank, micro_batch))
            # Scaled as in Engine.backward: ZeRO 0 divides a direct model output by the accumulation steps.
            engine.backward(guard.scaled(loss, fp16.manual_loss_scale(engine)), scale_wrt_gas=False)
            engine.step()
        norm = engine.get_global_grad_norm() if (unscaled := fp16.finish_step(engine)) is None else unscaled
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            got = torch.cat([-weight.detach().float().flatten().cpu() for weight in (model.matrix, model.vector)])
            pattern = torch.cat([_pattern(weight).flatten().cpu() for weight in (model.matrix, model.vector)])
        dtype, _ = engine.get_data_types()
    finally:
        engine.destroy()
    every = (_contribution(rank, index) for rank in range(mesh.world_size) for index in range(micro_batches))
    true = pattern * sum(every) / mesh.data_size
    return _factor_from(
        got, true, None if norm is None else float(norm), mesh, _TOLERANCE[dtype], dtype == torch.float16
    )


def _factor_from(
    got: torch.Tensor, true: torch.Tensor, norm: float | None, mesh: Mesh, slack: float, scaled: bool = False
) -> float:
    """Return true / got: one constant on all ranks, and under fp16's loss scale an integer or the inverse of one."""
    problem, factor = "", 1.0
    ratio = float((got @ true) / (true @ true))
    if not ratio > 0 or not bool(torch.isfinite(got).all()):
        problem = f"gradients are {got.tolist()} instead of {true.tolist()}"
    elif float((got - ratio * true).abs().max()) > slack * float((ratio * true).abs().max()):
        problem = f"gradients {got.tolist()} are not a constant multiple of the true ones {true.tolist()}"
    elif norm is not None and abs(norm / float(got.norm()) - 1) > slack:
        problem = f"the reported gradient norm {norm:g} is not the norm of the gradients, {float(got.norm()):g}"
    else:
        factor = _rounded(1 / ratio, mesh, slack)
        if scaled and min(abs(factor - round(factor)), abs(1 / factor - round(1 / factor))) > slack:
            problem = f"under a loss scale of {_SCALE} gradients are {1 / factor:g} times the true ones"
    everyone = exchange([int(bool(problem)), round(factor * 2**32)], mesh)
    if not problem and len({tuple(rank) for rank in everyone}) > 1:
        problem = f"ranks see different gradients: factors {[rank[1] / 2**32 for rank in everyone]}"
    if problem:
        raise EngineError(
            f"start-up probe of DeepSpeed's gradients over {mesh}: {problem}. No factor in the loss can correct that; "
            "remove unusual reduction options from the DeepSpeed configuration (predivide, quantised, hierarchical)"
        )
    return factor


def _rounded(factor: float, mesh: Mesh, slack: float) -> float:
    """Return the nearest mesh size or its inverse if ``factor`` is one up to rounding errors, else ``factor``."""
    sizes = {mesh.ring_size, mesh.ulysses_size, mesh.sequence_size, mesh.data_size, mesh.world_size}
    candidates = [1.0, *map(float, sizes), *(1.0 / size for size in sizes)]
    nearest = min(candidates, key=lambda candidate: abs(factor / candidate - 1))
    return nearest if abs(factor / nearest - 1) <= slack else factor

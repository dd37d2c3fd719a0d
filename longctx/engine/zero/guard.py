"""Gradient norm, clipping and the check for finite gradients, on the stages where DeepSpeed lacks them.

ZeRO 1 to 3 and the half-precision optimizers measure the norm themselves and skip an update that is not finite; ZeRO 0
in fp32 does neither. What depends on the internals of DeepSpeed's optimizers is in this package, ``engine.zero``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from longctx.engine.zero.trace import forget_with_trace

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def correct_optimizer(engine: DeepSpeedEngine) -> None:
    """Correct three things in a new engine's optimizer.

    ZeRO 1 and 2 always check for gradients that are not finite, which bf16 may have disabled. Half-precision optimizers
    without partitioned gradients sum the norms over a sequence group, whose ranks hold the same gradient, so they would
    report (and clip by) a norm √(ring·ulysses) times too large: their mpu is removed. For ZeRO 3 see ``trace``.
    """
    optimizer = engine.optimizer
    forget_with_trace(optimizer)
    if hasattr(optimizer, "check_grad_overflow"):
        optimizer.check_grad_overflow = True
    elif engine.zero_optimization_stage() < 2 and not is_fp32_zero0(engine) and hasattr(optimizer, "mpu"):
        optimizer.mpu = None


def scaled(loss: torch.Tensor, factor: float) -> torch.Tensor:
    """Return loss · factor; its gradient is NaN if the loss is not finite. Half precision is widened to fp32.

    An infinite loss may have finite gradients. NaN gradients reach every rank through ZeRO's reduction, so that all
    ranks skip the update, on every stage, without a device synchronisation per micro-batch.
    """
    wide = loss.to(torch.promote_types(loss.dtype, torch.float32))  # fp16 overflows at 65504, below usual loss scales
    return wide * torch.where(loss.detach().isfinite(), factor, math.nan).to(wide.dtype)


def is_fp32_zero0(engine: DeepSpeedEngine) -> bool:
    """Return whether the optimizer updates fp32 weights directly, without a wrapper of DeepSpeed (ZeRO 0 in fp32)."""
    return not (engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled())


def fp32_zero0_norm(engine: DeepSpeedEngine) -> float | None:
    """Return the gradient's norm on ZeRO 0 in fp32, where every rank holds the whole gradient, else None."""
    if not is_fp32_zero0(engine):
        return None
    norms = [torch.linalg.vector_norm(p.grad.double()) for p in engine.module.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def clip_fp32_zero0(engine: DeepSpeedEngine, norm: float | None) -> None:
    """Clip gradients to ``gradient_clipping`` by the formula of DeepSpeed's other stages."""
    assert norm is not None
    scale = (norm + 1e-6) / engine.gradient_clipping()
    if scale > 1:
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / scale)


def report_fp32_zero0_norm(engine: DeepSpeedEngine) -> None:
    """Make DeepSpeed's ``get_global_grad_norm`` return the norm before clipping on ZeRO 0 in fp32 as well."""
    clip = engine.clip_fp32_gradients

    def measured() -> None:
        engine._global_grad_norm = fp32_zero0_norm(engine)
        clip()

    engine.clip_fp32_gradients = measured


def drop_fp32_zero0(engine: DeepSpeedEngine) -> None:
    """Drop an accumulation window's gradients without an update, on ZeRO 0 in fp32."""
    engine.zero_grad()
    engine.micro_steps += 1


def uncount_step(engine: DeepSpeedEngine) -> None:
    """Undo DeepSpeed's counts of a step that it skipped."""
    engine.global_steps -= 1
    engine.global_samples -= engine.train_batch_size()

"""Norms, clipping and the last door before an update, for the stages on which DeepSpeed leaves them open.

ZeRO 1 to 3 and the half-precision optimizers measure the norm themselves and skip an update that is not finite; ZeRO 0
in fp32 does neither. Apart from ``engine`` because only these functions, ``order`` and ``fp16`` know DeepSpeed's
optimizers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from longctx.engine.zero.trace import forget_with_trace

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def close_doors(engine: DeepSpeedEngine) -> None:
    """Mend three things in a fresh engine's optimizer.

    ZeRO 1 and 2 look for gradients that are not finite whatever the dtype (bf16 may be told not to). The half-precision
    optimizers without partitioned gradients would add up the norms of a sequence group's ranks, which all hold the
    same gradient, and report (and clip by) a norm √(ring·ulysses) times too large: they stop asking the mpu. For ZeRO 3
    see ``trace``.
    """
    optimizer = engine.optimizer
    forget_with_trace(optimizer)
    if hasattr(optimizer, "check_grad_overflow"):
        optimizer.check_grad_overflow = True
    elif engine.zero_optimization_stage() < 2 and not is_plain(engine) and hasattr(optimizer, "mpu"):
        optimizer.mpu = None


def scaled(loss: torch.Tensor, factor: float) -> torch.Tensor:
    """Return loss · factor, whose gradient is NaN where the loss is not finite.

    An infinite loss may have finite gradients. As NaN they reach every rank through ZeRO's own reduction, and the
    update is refused there, everywhere and on every stage, without waiting for the device in each micro-batch.
    A loss in half precision is widened to fp32.
    """
    wide = loss.to(torch.promote_types(loss.dtype, torch.float32))  # fp16 ends at 65504, where loss scales begin
    return wide * torch.where(loss.detach().isfinite(), factor, math.nan).to(wide.dtype)


def is_plain(engine: DeepSpeedEngine) -> bool:
    """Return whether the client's own optimizer updates fp32 weights directly (ZeRO 0 in fp32)."""
    return not (engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled())


def plain_norm(engine: DeepSpeedEngine) -> float | None:
    """Return the gradient's norm on ZeRO 0 in fp32, where every rank holds all of it, else None."""
    if not is_plain(engine):
        return None
    norms = [torch.linalg.vector_norm(p.grad.double()) for p in engine.module.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def clip_plain(engine: DeepSpeedEngine, norm: float | None) -> None:
    """Scale gradients down to ``gradient_clipping``, by the formula DeepSpeed has on its other stages."""
    assert norm is not None
    scale = (norm + 1e-6) / engine.gradient_clipping()
    if scale > 1:
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / scale)


def drop_plain(engine: DeepSpeedEngine) -> None:
    """Forget a window's gradients without an update, on ZeRO 0 in fp32; the next window starts afresh."""
    engine.zero_grad()
    engine.micro_steps += 1


def uncount_step(engine: DeepSpeedEngine) -> None:
    """Take back what DeepSpeed counted for a step that it skipped."""
    engine.global_steps -= 1
    engine.global_samples -= engine.train_batch_size()

"""Norm, clipping and the propagation of losses that are not finite, where DeepSpeed does none of them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longctx.engine.zero.guard import (
    clip_fp32_zero0,
    drop_fp32_zero0,
    fp32_zero0_norm,
    is_fp32_zero0,
    scaled,
    uncount_step,
)


def engine(fp16: bool = False, bf16: bool = False, zero: bool = False, clip: float = 1.0) -> Any:
    module = torch.nn.Linear(2, 1)
    module.weight.grad = torch.tensor([[3.0, 0.0]])
    module.bias.grad = torch.tensor([4.0])
    return SimpleNamespace(
        module=module, zero_optimization=lambda: zero, fp16_enabled=lambda: fp16, bfloat16_enabled=lambda: bf16,
        gradient_clipping=lambda: clip, zero_grad=module.zero_grad, train_batch_size=lambda: 8,
        micro_steps=3, global_steps=5, global_samples=40,
    )  # fmt: skip


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_nan_gradients(loss: float) -> None:
    x = torch.tensor(1.0, requires_grad=True)
    scaled(x + loss, 2.0).backward()
    assert x.grad is not None and x.grad.isnan()


def test_a_finite_loss_is_multiplied_and_widened() -> None:
    x = torch.tensor(60_000.0, dtype=torch.float16, requires_grad=True)
    out = scaled(x, 4.0)
    out.backward()
    assert out.dtype == torch.float32 and float(out.detach()) == 4 * float(x.detach()) and float(x.grad) == 4.0  # type: ignore[arg-type]
    assert scaled(torch.tensor(1.0, dtype=torch.float64), 4.0).dtype == torch.float64


def test_the_norm_is_ours_only_where_fp32_weights_are_updated_directly() -> None:
    assert fp32_zero0_norm(engine()) == 5.0 and is_fp32_zero0(engine())
    for other in (engine(fp16=True), engine(bf16=True), engine(zero=True)):
        assert fp32_zero0_norm(other) is None and not is_fp32_zero0(other)
    empty = engine()
    empty.module.zero_grad()
    assert fp32_zero0_norm(empty) == 0.0


def test_gradients_are_clipped_to_the_norm() -> None:
    one = engine(clip=2.5)
    clip_fp32_zero0(one, fp32_zero0_norm(one))
    assert fp32_zero0_norm(one) == pytest.approx(2.5, rel=1e-5)
    one = engine(clip=6.0)
    clip_fp32_zero0(one, fp32_zero0_norm(one))
    assert fp32_zero0_norm(one) == 5.0


def test_dropped_and_skipped_steps_are_not_counted() -> None:
    one = engine()
    drop_fp32_zero0(one)
    assert fp32_zero0_norm(one) == 0.0 and one.micro_steps == 4
    uncount_step(one)
    assert (one.global_steps, one.global_samples) == (4, 32)

"""The optimizer's parameter groups and the learning-rate schedules."""

from __future__ import annotations

import pytest
import torch

from longctx.config.sections.train import TrainSection
from longctx.train.optimizer import SCHEDULES, learning_rate, make_optimizer, set_learning_rate


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule: str) -> None:
    def rate(step: int) -> float:
        return learning_rate(step, peak=2.0, warmup=10, total=110, schedule=schedule, final_ratio=0.1)

    assert [rate(step) for step in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(110) == rate(500) == pytest.approx(2.0 if schedule == "constant" else 0.2)
    assert rate(60) == pytest.approx({"constant": 2.0, "linear": 1.1, "cosine": 1.1}[schedule])
    rates = [rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_schedule_without_warmup_starts_near_the_peak() -> None:
    assert learning_rate(1, peak=1.0, warmup=0, total=100, schedule="cosine") > 0.99


def test_optimizer_decays_matrices_only() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    model[0].weight.requires_grad_(True)
    optimizer = make_optimizer(model, TrainSection(steps=1, weight_decay=0.2))
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.2), (3, 0.0)]
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert isinstance(make_optimizer(model, TrainSection(steps=1, optimizer="sgd", momentum=0.9)), torch.optim.SGD)

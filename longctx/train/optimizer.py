"""The optimizer of a run and its learning rate.

The optimizer is plain torch: nothing is compiled, and its state is plain tensors. The learning rate is a pure function
of the step: there is no scheduler state to save or to drift on resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from longctx.config.sections.train import TrainSection

SCHEDULES = ("cosine", "linear", "constant")
_STATE = ("params", "step")  # the entries of a parameter group that are not settings


def make_optimizer(model: torch.nn.Module, settings: TrainSection) -> torch.optim.Optimizer:
    """Return AdamW or SGD over the parameters of ``model`` that train.

    Matrices are decayed, vectors (norms, biases) are not. Under ZeRO-3 a parameter is a shard; ``ds_shape`` tells.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": settings.weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups[0 if len(shape) >= 2 else 1]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)


@contextmanager
def own_settings(optimizer: Any) -> Iterator[None]:
    """Keep every parameter group's settings (betas, eps, weight decay, momentum, …) through a block that loads state.

    A saved state carries the settings it was saved with, and loading it would silently put them back.
    """
    own = [{key: value for key, value in group.items() if key not in _STATE} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Set the learning rate of every parameter group, of a torch or a ZeRO optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = value


def learning_rate(step: int, *, peak: float, warmup: int, total: int, schedule: str, final_ratio: float = 0.0) -> float:
    """Return the learning rate of the update number ``step`` (from 1).

    It rises linearly to ``peak`` at update ``warmup``, then follows the schedule down to ``final_ratio * peak`` at
    update ``total`` and stays there.

    Raises:
        ValueError: the schedule is not one of ``SCHEDULES``.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if step <= warmup:
        return peak * step / max(warmup, 1)
    if schedule == "constant":
        return peak
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    height = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return peak * (final_ratio + (1 - final_ratio) * height)

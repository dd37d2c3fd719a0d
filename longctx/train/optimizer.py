"""The optimizer of a run: plain torch, so that nothing is compiled and its state is plain tensors."""

from __future__ import annotations

from typing import Any

import torch

from longctx.config.sections.train import Train


def make_optimizer(model: torch.nn.Module, settings: Train) -> torch.optim.Optimizer:
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


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Set the learning rate of every parameter group, of a torch or a ZeRO optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = value

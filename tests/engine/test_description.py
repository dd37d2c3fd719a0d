"""The description of what an engine trains: what must be equal between ranks is in it, what may differ is not."""

from __future__ import annotations

from typing import Any

import torch
from engine_tiny import tiny_llama

from longctx.engine.description import describe, describe_config

SETTINGS: dict[str, Any] = {"zero_optimization": {"stage": 3}, "steps_per_print": 10}


def described(model: Any = None, settings: dict[str, Any] = SETTINGS, **more: Any) -> dict[str, str]:
    return describe(torch.nn.Linear(2, 3) if model is None else model, settings, "zigzag", 0, **more)


def test_settings_that_change_training_are_described() -> None:
    facts = described()
    assert facts["config.zero_optimization.stage"] == "3" and facts["layout"] == "zigzag" and facts["seed"] == "0"
    assert facts["model class"] == "Linear"
    assert described(training_rows=7)["training_rows"] == "7"


def test_what_may_differ_between_hosts_is_not() -> None:
    folder = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/mnt/a"}}
    facts = described(settings={"zero_optimization": folder, "tensorboard": {"enabled": True}})
    assert facts["config.zero_optimization.offload_optimizer.device"] == "nvme"
    assert not any("nvme_path" in key or "tensorboard" in key or "steps_per_print" in key for key in facts)


def test_models_differ_by_shape_dtype_and_what_is_trained() -> None:
    frozen = torch.nn.Linear(2, 3).requires_grad_(False)
    models = (torch.nn.Linear(2, 3), torch.nn.Linear(3, 2), torch.nn.Linear(2, 3).double(), frozen)
    assert len({tuple(sorted(described(model).items())) for model in models}) == len(models)
    assert described(torch.nn.Linear(2, 3)) == described(torch.nn.Linear(2, 3))  # not by the values of weights


def test_optimizers_are_described_by_their_groups() -> None:
    model = torch.nn.Linear(2, 3)
    facts = described(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.25))
    assert facts["optimizer"] == "SGD" and facts["optimizer.param_groups[0].lr"] == "0.25"


def test_a_config_is_described_without_where_it_was_read() -> None:
    config = tiny_llama().config
    config._name_or_path = "/somewhere"
    facts = describe_config(config)
    assert facts["model.config.hidden_size"] == str(config.hidden_size) and "/somewhere" not in facts.values()
    assert describe_config(object()) == {}

"""The start-up probe finds each path's factor, and refuses what no factor can mend."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from engine_tiny import run_ranks

from longctx.engine import gradient_probe as probe
from longctx.engine.settings import load_settings
from longctx.errors import EngineError
from longctx.mesh import Mesh


def found(rank: int, world: int, ring: int, config: dict[str, Any]) -> tuple[float, list[str], float]:
    mesh = Mesh(ring=ring).connect()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    probe.logger.addHandler(handler)
    probe._known.clear()
    begin = time.perf_counter()
    try:
        factor = probe.gradient_factor(load_settings(config, mesh), mesh, mesh)
        seconds = time.perf_counter() - begin
        assert probe.gradient_factor(load_settings(config, mesh), mesh, mesh) == factor  # remembered, said once
    finally:
        probe.logger.removeHandler(handler)
    return factor, messages, seconds


PATHS = [
    ({"zero_optimization": {"stage": 0}}, False),
    ({"zero_optimization": {"stage": 1}}, False),
    ({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 3}, False),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, False),
    ({"zero_optimization": {"stage": 3}}, True),
    ({"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 2, "bf16": {"enabled": True}}, True),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, True),
    ({"zero_optimization": {"stage": 3, "reduce_scatter": False}}, False),
    ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, False),
    (
        {
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        False,
    ),
    ({"zero_optimization": {"stage": 1}, "prescale_gradients": True, "gradient_predivide_factor": 2.0}, False),
]


@pytest.mark.parametrize(("config", "world_divided"), PATHS)
def test_the_factor_of_each_path(config: dict[str, Any], world_divided: bool) -> None:
    for rank, (factor, messages, _) in enumerate(run_ranks(4, found, 2, config)):
        assert factor == (2.0 if world_divided else 1.0)
        assert len(messages) == (1 if world_divided and rank == 0 else 0)  # announced when it corrects, by one rank
        assert not messages or "multiplies by 2" in messages[0]


def test_the_factor_is_the_size_of_the_sequence_group() -> None:
    config = {"zero_optimization": {"stage": 3}}
    assert {factor for factor, *_ in run_ranks(4, found, 4, config)} == {4.0}
    assert {factor for factor, *_ in run_ranks(2, found, 1, config)} == {1.0}


def test_summing_instead_of_averaging_is_mended() -> None:
    config = {"zero_optimization": {"stage": 1}, "gradient_allreduce_op": "sum"}
    assert {factor for factor, *_ in run_ranks(4, found, 2, config)} == {0.5}


def test_it_keeps_what_decides_the_path_and_drops_what_costs() -> None:
    zero = {"stage": 3, "reduce_bucket_size": 5e8, "overlap_comm": True, "offload_optimizer": {"device": "nvme"}}
    settings = {
        "zero_optimization": zero,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW"},
        "tensorboard": {"enabled": True},
        "gradient_clipping": 1.0,
    }
    small = probe.probe_settings(settings)
    assert small["zero_optimization"]["stage"] == 3 and small["zero_optimization"]["overlap_comm"] is True
    assert small["zero_optimization"]["reduce_bucket_size"] == 4096  # not two gigabytes
    assert small["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert small["bf16"] == {"enabled": True} and small["gradient_clipping"] == 0.0
    assert "optimizer" not in small and "tensorboard" not in small
    assert zero["reduce_bucket_size"] == 5e8  # the run's own settings are left alone


def judged(rank: int, world: int, fault: str) -> str:
    mesh = Mesh(ring=2).connect()
    true = torch.arange(1.0, 9.0)
    got, norm = true / 2, None
    if fault == "ranks differ":
        got = true / (1 + rank % 2)
    if fault == "no constant":
        got = true / 2 + torch.tensor([0.1, 0, 0, 0, 0, 0, 0, 0])
    if fault == "nothing":
        got = torch.zeros(8)
    if fault == "not finite" and rank == 3:
        got = got * float("nan")
    if fault == "norm":
        norm = float(got.norm()) * 1.4
    with pytest.raises(EngineError) as error:
        probe._factor_from(got, true, norm, mesh, 1e-5)
    return str(error.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ranks differ", "ranks see different gradients"),
        ("no constant", "not a constant multiple"),
        ("nothing", "instead of"),
        ("not finite", "gradients"),
        ("norm", "gradient norm"),
    ],
)
def test_what_no_factor_can_mend_is_refused_on_all_ranks(fault: str, message: str) -> None:
    for error in run_ranks(4, judged, fault):
        assert message in error


def test_low_precision_does_not_blur_the_factor() -> None:
    mesh = Mesh(ring=4, data=3, world_size=12)
    assert probe._rounded(3.97, mesh, 2e-2) == 4.0
    assert probe._rounded(0.3342, mesh, 2e-2) == 1 / 3
    assert probe._rounded(1.7, mesh, 1e-5) == 1.7

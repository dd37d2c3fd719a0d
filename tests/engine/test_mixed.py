"""The engine trains a model with bounded layers as one process would: ring 2 on every ZeRO stage."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from engine_tiny import ragged_rows, run_ranks, tiny_llama

from tolerances import tolerance

STEPS, LAYERS = 4, {"0": {"abc": {"slots": 4}}, "1": "cosine"}


def model() -> Any:
    import longctx

    made = longctx.convert(tiny_llama("sdpa"), LAYERS)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".memory." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@functools.cache
def truth() -> dict[str, Any]:
    """Plain training in one process on whole rows."""
    from longctx.engine.step.rows import explicit_rows

    whole = model()
    rule, losses = optimizer(whole.parameters()), []
    for step in range(STEPS):
        rows = explicit_rows(ragged_rows(step, 0, 0))
        labels = rows["shift_labels"]
        keys = ("input_ids", "position_ids", "document_ids")
        logits = whole(**{key: rows[key] for key in keys}, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        rule.step()
        rule.zero_grad()
        losses.append(float(loss))
    return {"losses": losses, "weights": {name: p.detach().clone() for name, p in whole.named_parameters()}}


def trained(rank: int, world: int, stage: int) -> dict[str, Any]:
    import deepspeed

    import longctx

    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1e9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    mesh = longctx.Mesh(ring=world)
    start = model()
    engine, *_ = longctx.initialize(start, settings, mesh, optimizer=optimizer(start.parameters()))
    losses = []
    for step in range(STEPS):
        batch = engine.shard(ragged_rows(step, 0, 0))
        engine.backward(engine(**batch).loss)
        engine.step()
        losses.append(engine.global_loss)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return {"losses": losses, "weights": weights}


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.deep) for stage in (1, 2)), 3])
def test_every_stage_trains_as_one_process(stage: int) -> None:
    wanted = truth()
    for result in run_ranks(2, trained, stage):
        torch.testing.assert_close(result["losses"], wanted["losses"], rtol=tolerance("training loss"), atol=0)
        for name, weight in wanted["weights"].items():
            error = (result["weights"][name] - weight).norm() / weight.norm()
            assert error <= tolerance("training weight"), (name, float(error))


def built(rank: int, world: int, stage: int) -> dict[str, torch.Tensor]:
    """Build from a converted config and return the new weights."""
    import deepspeed
    from models.zoo import tiny_config

    import longctx

    mesh = longctx.Mesh(ring=world)
    config = longctx.convert(tiny_config("llama"), LAYERS)
    made = longctx.build(config, mesh, config={"zero_optimization": {"stage": stage}}, seed=4)
    with deepspeed.zero.GatheredParameters(list(made.parameters())):
        return {name: p.detach().clone() for name, p in made.named_parameters() if ".memory." in name}


def test_new_weights_do_not_depend_on_stage_or_rank() -> None:
    results = [*run_ranks(2, built, 0), *run_ranks(2, built, 3)]
    for result in results:
        assert sorted(result) == sorted(results[0]) and len(result) == 2
        for name, weight in result.items():
            assert torch.equal(weight, results[0][name]), name
            assert weight.isfinite().all() and float(weight.abs().max()) > 0.05

"""longctx.attach: models and engines that somebody else made train right too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_tiny import make_optimizer, ragged_rows, run_ranks, tiny_llama, train_plainly

from longctx.errors import EngineError

from tolerances import tolerance


def foreign(rank: int, world: int, stage: int, with_mpu: bool, before: bool) -> Any:
    """An engine from deepspeed.initialize, attached before (its model) and after it was made."""
    import deepspeed
    from deepspeed.utils import groups

    import longctx

    mesh = longctx.Mesh(ring=2).connect()
    groups.mpu = None  # what a fresh process has
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 600},
    }
    if with_mpu:
        settings["sequence_parallel_size"] = 2
    model = tiny_llama()
    if before:
        assert longctx.attach(model, mesh) is model
    optimizer = make_optimizer("sgd", model.parameters())
    theirs, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mesh if with_mpu else None)
    engine = longctx.attach(theirs, mesh)
    assert engine is theirs and isinstance(engine, longctx.Engine)
    losses, norms = [], []
    for step in range(4):
        for batch in engine.shard([ragged_rows(step, index, mesh.data_rank) for index in range(2)]):
            engine.backward(engine(**batch).loss)
            engine.step()
        losses.append(engine.global_loss)
        norms.append(engine.grad_norm)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return losses, norms, weights


@pytest.mark.parametrize(
    ("stage", "with_mpu", "before"),
    [
        (0, True, True),
        pytest.param(3, True, False, marks=pytest.mark.deep),
        pytest.param(0, False, False, marks=pytest.mark.deep),
        pytest.param(1, False, True, marks=pytest.mark.deep),
        pytest.param(2, False, False, marks=pytest.mark.deep),
        (3, False, True),
    ],
)
def test_an_engine_that_others_made(stage: int, with_mpu: bool, before: bool) -> None:
    model = tiny_llama()
    optimizer = make_optimizer("sgd", model.parameters())
    truth = train_plainly(model, optimizer, steps=4, replicas=2, accumulation=2, clip=0.9)
    for losses, norms, weights in run_ranks(4, foreign, stage, with_mpu, before):
        torch.testing.assert_close(losses, truth["losses"], rtol=tolerance("training loss"), atol=0)
        torch.testing.assert_close(norms, truth["norms"], rtol=tolerance("training norm"), atol=0)
        for name, weight in truth["weights"].items():
            assert (weights[name] - weight).norm() <= tolerance("training weight") * weight.norm(), name


def refused(rank: int, world: int) -> list[str]:
    import deepspeed

    import longctx

    wide, narrow = longctx.Mesh(ring=4).connect(), longctx.Mesh(ring=2).connect()
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000}}
    settings["zero_allow_untested_optimizer"] = True
    messages = []
    for options in ({"mpu": wide}, {"mesh_param": (2, 2)}):
        model = tiny_llama(num_hidden_layers=1)
        optimizer = make_optimizer("sgd", model.parameters())
        theirs, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(settings), **options)
        with pytest.raises(EngineError) as error:
            longctx.attach(theirs, narrow)
        messages.append(str(error.value))
        theirs.destroy()
        deepspeed.utils.groups.mesh_device = None
    return messages


def test_engines_that_split_otherwise_are_refused() -> None:
    for size, mesh_param in run_ranks(4, refused):
        assert "over 4 ranks" in size and "mesh_param" in mesh_param


def apart(rank: int, world: int) -> list[str]:
    """Rank 1 alone attaches with another layout, or brings an engine with another learning rate."""
    import deepspeed

    import longctx

    mesh = longctx.Mesh(ring=2).connect()
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000}}
    settings["zero_allow_untested_optimizer"] = True
    messages = []
    for fault in ("layout", "lr"):
        model = tiny_llama(num_hidden_layers=1)
        optimizer = make_optimizer("sgd", model.parameters())
        optimizer.param_groups[0]["lr"] = 0.3 if (fault, rank) == ("lr", 1) else 0.1
        theirs, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(settings), mpu=mesh)
        with pytest.raises(EngineError) as error:
            longctx.attach(theirs, mesh, "striped" if (fault, rank) == ("layout", 1) else "zigzag")
        messages.append(str(error.value))
        theirs.destroy()
    return messages


def test_engines_of_ranks_that_disagree_are_stopped() -> None:
    for layout, rate in run_ranks(2, apart):
        assert "layout: zigzag on rank 0, striped on rank 1" in layout
        assert "param_groups[0].lr: 0.1 on rank 0, 0.3 on rank 1" in rate

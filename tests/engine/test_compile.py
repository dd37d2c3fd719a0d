"""torch.compile: a compiled model trains to the same losses; what would replace the measured reduction is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_tiny import make_optimizer, ragged_rows, run_ranks, tiny_llama, train_plainly

from longctx.errors import EngineError

from tolerances import tolerance


def compiled(rank: int, world: int, stage: int, how: str) -> list[float]:
    import longctx

    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 600},
    }
    model = tiny_llama(num_hidden_layers=1)
    if how == "model":
        model.compile(backend="aot_eager", dynamic=True)
    if how == "layers":
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", dynamic=True)
    mesh = longctx.Mesh(ring=2)
    engine, *_ = longctx.initialize(model, settings, mesh, optimizer=make_optimizer("sgd", model.parameters()))
    if how == "engine":
        engine.compile(backend="aot_eager")
    losses = []
    for step in range(3):
        batch = engine.shard(ragged_rows(step, 0, mesh.data_rank))
        engine.backward(engine(**batch).loss)
        engine.step()
        losses.append(engine.global_loss)
    engine.destroy()
    torch._dynamo.reset()
    return losses


SLOW = ((0, "model"), (1, "layers"), (2, "model"), (3, "model"))


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        (1, "engine"),
        pytest.param(3, "layers", marks=pytest.mark.deep),
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW),
    ],
)
def test_a_compiled_model_trains_alike(stage: int, how: str) -> None:
    model = tiny_llama(num_hidden_layers=1)
    optimizer = make_optimizer("sgd", model.parameters())
    truth = train_plainly(model, optimizer, steps=3, replicas=1, accumulation=1, clip=0)
    for losses in run_ranks(2, compiled, stage, how):
        torch.testing.assert_close(losses, truth["losses"], rtol=tolerance("training loss"), atol=0)


def deepcompiled(rank: int, world: int) -> str:
    import longctx

    model: Any = tiny_llama(num_hidden_layers=1)
    settings = {"train_micro_batch_size_per_gpu": 2, "compile": {"deepcompile": True}}
    with pytest.raises(EngineError) as error:
        longctx.initialize(model, settings, longctx.Mesh(ring=2), optimizer=make_optimizer("sgd", model.parameters()))
    return str(error.value)


def test_deepcompile_is_refused_by_name() -> None:
    assert all("compile.deepcompile" in message for message in run_ranks(2, deepcompiled))

"""A second copy of ZeRO-3's weights, sharded over neighbouring ranks (DeepSpeed's hpZ), trains the same model."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_tiny import make_engine, make_optimizer, ragged_rows, run_ranks, run_window, tiny_llama, train_plainly
from engine_tiny import weights_of as whole_weights

from longctx.engine.settings import load_settings
from longctx.errors import EngineError
from longctx.mesh import Mesh

from tolerances import tolerance

STEPS = 3
LET_GO = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
# What is used is let go at once, so that backward gathers it again, from the copy.
COPY = {"zero_hpz_partition_size": 2, **{f"stage3_{key}": 0 for key in LET_GO}}


def uneven() -> torch.nn.Module:
    """A model whose weights have numbers that four ranks do not divide."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    return tiny_llama(hidden_size=18, intermediate_size=27, **heads)


def train(rank: int, world: int, ring: int, ulysses: int, zero: dict[str, Any], recompute: str) -> Any:
    """Losses, norms and weights of an engine with the copy, and the share of a weight that this rank's copy is."""
    model = uneven()
    engine = make_engine(
        ring, 3, ulysses=ulysses, model=model, gas=2, zero=COPY | zero, memory={"recompute": recompute}
    )
    losses, norms = [], []
    for step in range(STEPS):
        run_window(engine, [ragged_rows(step, index, engine.mesh.data_rank) for index in range(2)])
        losses.append(engine.global_loss)
        norms.append(engine.grad_norm)
    with torch.no_grad():
        engine(**engine.shard([ragged_rows(9, index, engine.mesh.data_rank) for index in range(2)])[0])
    weight = engine.module.model.layers[0].mlp.up_proj.weight
    share = weight.ds_secondary_tensor.numel() / weight.ds_numel
    weights = whole_weights(engine)
    engine.destroy()
    return losses, norms, weights, share


@functools.cache
def truth(replicas: int) -> dict[str, Any]:
    model = uneven()
    optimizer = make_optimizer("sgd", model.parameters())
    return train_plainly(model, optimizer, steps=STEPS, replicas=replicas, accumulation=2, clip=0)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("ring", "ulysses", "zero", "recompute"),
    [
        (2, 1, {}, "none"),
        pytest.param(4, 1, {}, "layer", marks=pytest.mark.deep),
        pytest.param(2, 2, {"overlap_comm": True}, "layer_keep_attention", marks=pytest.mark.deep),
        pytest.param(2, 1, {"reduce_scatter": False}, "mlp", marks=pytest.mark.deep),
        pytest.param(2, 1, OFFLOAD, "layer", marks=pytest.mark.deep),
    ],
)
def test_the_copy_trains_the_same_model(ring: int, ulysses: int, zero: dict[str, Any], recompute: str) -> None:
    wanted = truth(4 // (ring * ulysses))
    for losses, norms, weights, share in run_ranks(4, train, ring, ulysses, zero, recompute):
        torch.testing.assert_close(losses, wanted["losses"], rtol=tolerance("training loss"), atol=0)
        torch.testing.assert_close(norms, wanted["norms"], rtol=tolerance("training norm"), atol=0)
        for key, weight in wanted["weights"].items():
            assert (weights[key] - weight).norm() <= tolerance("training weight") * weight.norm(), key
        assert share == pytest.approx(1 / 2, rel=0.02)


def saved_and_resumed(rank: int, world: int, folder: str) -> tuple[Any, Any]:
    """(loss of the second step, weights after it) without a break, and of an engine with other weights that resumes;
    the first layer is frozen, whose copy DeepSpeed keeps for ever."""

    def engine_of(seed: int) -> Any:
        model = tiny_llama(seed=seed)
        for parameter in model.model.layers[0].parameters():
            parameter.requires_grad_(False)
        return make_engine(2, 3, model=model, zero=COPY)

    def step(engine: Any, number: int) -> None:
        run_window(engine, [ragged_rows(number, 0, engine.mesh.data_rank)])

    straight = engine_of(0)
    step(straight, 0)
    straight.save_checkpoint(folder, tag="first")
    step(straight, 1)
    resumed = engine_of(5)
    step(resumed, 7)  # its copies are of its own weights
    resumed.load_checkpoint(folder, tag="first")
    step(resumed, 1)
    found = [(engine.global_loss, engine.grad_norm, whole_weights(engine)) for engine in (straight, resumed)]
    for engine in (straight, resumed):
        engine.destroy()
    dist.barrier()
    return found[0], found[1]


@pytest.mark.deep
def test_a_checkpoint_is_resumed_without_what_the_copy_held_before() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for straight, resumed in run_ranks(4, saved_and_resumed, folder):
            assert resumed[:2] == straight[:2]
            for name, weight in straight[2].items():
                assert torch.equal(resumed[2][name], weight), name


def sizes_of_groups(rank: int, world: int) -> list[Any]:
    """In one process after another: ranks that share a copy, in engines and in models that were built."""
    import longctx

    found: list[Any] = []
    mesh = longctx.Mesh(ring=4)

    def shared(model: Any) -> list[int]:
        weight = model.model.norm.weight
        group = weight.ds_zero_param_process_group
        return [] if group is None else dist.get_process_group_ranks(group)

    for zero in (COPY, {}, COPY):
        engine = make_engine(4, 3, zero=zero)
        found.append(shared(engine.module))
        engine.destroy()
    for zero in (COPY, COPY, {}):
        settings = {"zero_optimization": {"stage": 3, **zero}}
        model = longctx.build(tiny_llama().config, mesh, config=settings)
        found.append(shared(model))
    try:
        make_engine(4, 3, model=model, zero=COPY)
    except EngineError as error:
        found.append(str(error))
    return found


@pytest.mark.deep
def test_every_engine_and_every_model_gets_the_group_it_asks_for() -> None:
    """DeepSpeed by itself gives them all the first one's, and fails on a second model."""
    for rank, (*groups, message) in enumerate(run_ranks(4, sizes_of_groups)):
        ours = [0, 1] if rank < 2 else [2, 3]
        assert groups == [ours, [], ours, ours, ours, []]
        assert "the model was built with 1" in message and "zero_hpz_partition_size" in message


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 2, "zero_hpz_partition_size": 2}, "stage 2 does not shard weights: use stage 3"),
        (
            {"stage": 3, "zero_hpz_partition_size": 5},
            "divide the world of 12 and are smaller than it: use one of 2, 3, 4, 6",
        ),
        ({"stage": 3, "zero_hpz_partition_size": 12}, "use one of 2, 3, 4, 6"),
        ({"stage": 3, "zero_hpz_partition_size": "2"}, "'2'; give a number"),
        ({"stage": 3, "mics_shard_size": 2}, "mics_shard_size"),
    ],
)
def test_sizes_that_cannot_be_are_named(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError) as error:
        load_settings({"zero_optimization": zero}, Mesh(ring=4, data=3, world_size=12))
    assert message in str(error.value)
    assert load_settings({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}, Mesh(12, world_size=12))


def disagreeing(rank: int, world: int) -> str:
    from types import SimpleNamespace

    from longctx.errors import ConfigError
    from longctx.train.job import agree_on_group

    agree_on_group(SimpleNamespace(group=2))  # type: ignore[arg-type]
    try:
        agree_on_group(SimpleNamespace(group=2 if rank < 2 else None))  # type: ignore[arg-type]
    except ConfigError as error:
        return str(error)
    return ""


def test_hosts_of_different_sizes_are_told_to_write_a_number() -> None:
    assert all("[2, 2, None, None]" in message and "zero.group" in message for message in run_ranks(4, disagreeing))

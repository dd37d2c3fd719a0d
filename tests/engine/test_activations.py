"""Saving memory changes nothing that is trained: losses, norms and weights over ranks equal one plain process."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from engine_tiny import (
    make_engine,
    make_optimizer,
    ragged_rows,
    run_ranks,
    run_window,
    tiny_llama,
    train_plainly,
    unsharded_loss,
    weights_of,
)

from longctx.attention import comm
from longctx.engine.activations import ActivationSettings, apply_settings, read_settings
from longctx.errors import EngineError

from tolerances import tolerance


def train(
    rank: int, world: int, ring: int, stage: int, memory: dict[str, Any], sizes: dict[str, Any], **config: Any
) -> tuple[list[float], list[float], dict[str, torch.Tensor], float]:
    engine = make_engine(ring, stage, model=tiny_llama(**sizes), gas=2, memory=memory, **config)
    losses, norms = [], []
    for step in range(3):
        run_window(engine, [ragged_rows(step, index, engine.mesh.data_rank) for index in range(2)])
        losses.append(engine.global_loss)
        norms.append(engine.grad_norm)
    weights = weights_of(engine)
    held_out = engine.evaluate([ragged_rows(9, 0, engine.mesh.data_rank)]).loss
    engine.destroy()
    return losses, norms, weights, held_out


def check(stage: int, memory: dict[str, Any], **sizes: Any) -> None:
    model = tiny_llama(**sizes)
    truth = train_plainly(model, make_optimizer("sgd", model.parameters()), steps=3, replicas=2, accumulation=2, clip=0)
    with torch.no_grad():
        parts = [unsharded_loss(model, ragged_rows(9, 0, replica)) for replica in range(2)]
    truth["held out"] = float(sum(part for part, _ in parts)) / sum(count for _, count in parts)
    for losses, norms, weights, held_out in run_ranks(4, train, 2, stage, memory, sizes):
        torch.testing.assert_close(losses, truth["losses"], rtol=tolerance("training loss"), atol=0)
        torch.testing.assert_close(norms, truth["norms"], rtol=tolerance("training norm"), atol=0)
        torch.testing.assert_close(held_out, truth["held out"], rtol=tolerance("training loss"), atol=0)
        for name, weight in truth["weights"].items():
            assert (weights[name] - weight).norm() <= tolerance("training weight") * weight.norm(), name


@pytest.mark.parametrize(("stage", "tied"), [(0, False), pytest.param(3, False, marks=pytest.mark.deep), (3, True)])
def test_a_tiled_loss_trains_the_same_model(stage: int, tied: bool) -> None:
    check(stage, {"loss_tile": 3}, tie_word_embeddings=tied)


class Traffic:
    """Counts, by a parameter's name, how often ZeRO-3 gathers it and reduces its gradient."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

        self.gathered: Counter[str] = Counter()
        self.reduced: Counter[str] = Counter()
        names = {p.ds_id: name for name, p in engine.module.named_parameters()}
        gather = Coordinator._PartitionedParameterCoordinator__all_gather_params  # type: ignore[attr-defined]
        reduce = type(engine.optimizer).reduce_independent_p_g_buckets_and_remove_grads

        def counted_gather(coordinator: Any, params: Any, *args: Any, **keywords: Any) -> Any:
            self.gathered.update(names[p.ds_id] for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
            return gather(coordinator, params, *args, **keywords)

        def counted_reduce(optimizer: Any, param: Any, *args: Any, **keywords: Any) -> Any:
            self.reduced[names[param.ds_id]] += 1
            return reduce(optimizer, param, *args, **keywords)

        monkeypatch.setattr(Coordinator, "_PartitionedParameterCoordinator__all_gather_params", counted_gather)
        monkeypatch.setattr(type(engine.optimizer), "reduce_independent_p_g_buckets_and_remove_grads", counted_reduce)


def count_traffic(rank: int, world: int, memory: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    engine = make_engine(2, 3, memory=memory, zero={"stage3_max_reuse_distance": 0})  # nothing is left gathered
    run_window(engine, [ragged_rows(0, 0, 0)])  # the first step records the order of modules
    with pytest.MonkeyPatch.context() as patch:
        traffic = Traffic(engine, patch)
        run_window(engine, [ragged_rows(1, 0, 0)])
    engine.destroy()
    return dict(traffic.gathered), dict(traffic.reduced)


def norms_under_zero3(rank: int, world: int, recomputed: bool) -> tuple[Any, ...]:
    """Weights after two steps, and how often norms are gathered and reduced in the second."""
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}  # norms are partitioned as well
    memory = {"recompute": "layer_keep_attention", "recompute_norms": recomputed}
    engine = make_engine(2, 3, memory=memory, zero=zero)
    assert ("forward" in vars(engine.module.model.norm)) >= recomputed
    run_window(engine, [ragged_rows(0, 0, 0)])  # the first step records the order of modules
    with pytest.MonkeyPatch.context() as patch:
        traffic = Traffic(engine, patch)
        run_window(engine, [ragged_rows(1, 0, 0)])
    weights = weights_of(engine)
    engine.destroy()
    counts = ({key: n for key, n in kind.items() if "norm" in key} for kind in (traffic.gathered, traffic.reduced))
    return weights, *counts


def test_zero3_has_a_recomputed_norms_weight_in_backward_and_reduces_it_once() -> None:
    kept, recomputed = (run_ranks(2, norms_under_zero3, switch) for switch in (False, True))
    for (wanted, gathered_before, _), (weights, gathered, reduced) in zip(kept, recomputed, strict=True):
        assert gathered and gathered == gathered_before
        assert len(reduced) == 5 and set(reduced.values()) == {1}  # two a layer, and the one before the head
        for name, weight in wanted.items():
            assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.deep)])
def test_tiled_mlps_train_the_same_model(stage: int) -> None:
    check(stage, {"mlp_tile": 5})


@pytest.mark.parametrize(
    ("stage", "memory"),
    [
        (3, {"recompute": "layer_keep_attention", "mlp_tile": 5, "loss_tile": 3}),
        (2, {"recompute": "layer_keep_attention", "mlp_tile": 5, "offload_checkpoints": True}),
        pytest.param(3, {"recompute": "mlp"}, marks=pytest.mark.deep),
    ],
)
def test_recomputation_trains_the_same_model(stage: int, memory: dict[str, Any]) -> None:
    check(stage, memory)


def count_hops(rank: int, world: int, recompute: str) -> int:
    engine = make_engine(2, 3, memory={"recompute": recompute})
    run_window(engine, [ragged_rows(0, 0, 0)])
    before = comm.counters.hops
    run_window(engine, [ragged_rows(1, 0, 0)])
    engine.destroy()
    return comm.counters.hops - before


def test_a_step_that_keeps_attention_has_the_hops_of_forward_and_backward_only() -> None:
    hops = {policy: run_ranks(2, count_hops, policy) for policy in ("none", "layer", "layer_keep_attention")}
    assert hops["layer_keep_attention"] == hops["none"]
    assert hops["layer"][0] > hops["none"][0]


def test_zero3_gathers_a_tiled_mlp_twice_and_reduces_it_once() -> None:
    for gathered, reduced in run_ranks(2, count_traffic, {"mlp_tile": 2}):
        for layer in range(2):
            for name in ("gate", "up", "down"):
                assert 1 <= gathered[f"model.layers.{layer}.mlp.{name}_proj.weight"] <= 2  # forward and backward
        assert set(reduced.values()) == {1} and "model.layers.0.mlp.down_proj.weight" in reduced


def test_zero3_gathers_a_tiled_loss_twice_and_reduces_it_once() -> None:
    for gathered, reduced in run_ranks(2, count_traffic, {"loss_tile": 2}):
        assert 1 <= gathered["lm_head.weight"] <= 2  # forward and backward, which follow each other
        assert set(reduced.values()) == {1} and "lm_head.weight" in reduced


def test_memory_is_checked() -> None:
    assert read_settings(None) == ActivationSettings() and read_settings({"loss_tile": 3}).loss_tile == 3
    with pytest.raises(EngineError, match="'loss_tiles' is unknown"):
        read_settings({"loss_tiles": 3})
    with pytest.raises(EngineError, match="give a dictionary"):
        read_settings("loss_tile")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="set loss_tile"):
        apply_settings(tiny_llama(), ActivationSettings(z_loss=0.1))


def test_auto_says_what_it_leaves_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(2, 2)
    apply_settings(model, ActivationSettings(loss_tile="auto"), announce=False)
    assert not caplog.records
    apply_settings(model, ActivationSettings(loss_tile="auto"))
    assert "the loss is not tiled: Linear is not one of" in caplog.text
    apply_settings(model, ActivationSettings(mlp_tile="auto"))
    assert "MLPs are not tiled: Linear has no plain ones" in caplog.text

"""Gradients of equally large weights are never exchanged for one another, whatever the lengths of the ranks' rows."""

from __future__ import annotations

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
    weights_of,
)

import longctx
from longctx.engine.activations import ActivationSettings, apply_settings
from longctx.engine.step.window import shard_window
from longctx.engine.zero.order import ReductionOrder, check_order
from longctx.errors import EngineError

from tolerances import tolerance

BETWEEN = 50  # tokens: replica 0 has 44 to 48 and 56 to 60 in its two micro-batches, replica 1 50 to 54 and 62 to 66


def train(rank: int, world: int, stage: int, memory: dict[str, Any]) -> dict[str, Any]:
    engine = make_engine(1, stage, gas=2, memory=memory)
    losses = []
    for step in range(2):
        run_window(engine, [ragged_rows(step, index, engine.mesh.data_rank) for index in range(2)])
        losses.append(engine.global_loss)
    weights = weights_of(engine)
    engine.destroy()
    return {"losses": losses, "weights": weights}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("memory", [{"mlp_tile": BETWEEN}, {"mlp_tile": BETWEEN, "recompute": "layer"}], ids=str)
def test_replicas_whose_rows_are_shorter_and_longer_than_a_tile(stage: int, memory: dict[str, Any]) -> None:
    model = tiny_llama()
    optimizer = make_optimizer("sgd", model.parameters())
    wanted = train_plainly(model, optimizer, steps=2, replicas=2, accumulation=2, clip=0)
    for result in run_ranks(2, train, stage, memory):
        torch.testing.assert_close(result["losses"], wanted["losses"], rtol=tolerance("training loss"), atol=0)
        for name, weight in wanted["weights"].items():
            error = (result["weights"][name] - weight).norm() / weight.norm()
            assert error <= tolerance("training weight"), (name, float(error))


class Fickle(torch.nn.Module):
    """Two equally large weights whose gradients are finished in an order that one rank turns round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, turned: bool) -> torch.Tensor:
        for layer in (self.second, self.first) if turned else (self.first, self.second):
            x = layer(x)
        return x.square().sum()


def reorder(rank: int, world: int, stage: int, zero: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    engine = make_engine(1, stage, model=Fickle(), zero=zero)
    message, before = "", weights_of(engine)
    for turned in (False, rank == 1):  # the first window agrees
        engine.backward(engine(torch.ones(1, 4), turned))
        try:
            engine.step()
        except EngineError as error:
            message = str(error)
        else:
            before = weights_of(engine)
    unchanged = all(torch.equal(before[name], weight) for name, weight in weights_of(engine).items())
    engine.destroy()
    return {"message": message, "unchanged": unchanged}


@pytest.mark.parametrize(("stage", "zero"), [(1, {"overlap_comm": True}), (2, {})], ids=["1", "2"])
def test_another_order_on_one_rank_stops_every_rank_before_the_update(stage: int, zero: dict[str, Any]) -> None:
    for result in run_ranks(2, reorder, stage, zero):
        assert "different orders" in result["message"] and "stage 0" in result["message"]
        assert result["unchanged"]


@pytest.mark.parametrize("stage", [0, 1])
def test_an_order_that_changes_no_result_is_no_error(stage: int) -> None:
    for result in run_ranks(2, reorder, stage, {}):
        assert result["message"] == ""


SWITCHES: list[dict[str, Any]] = [
    {},
    {"loss_tile": 3},
    {"mlp_tile": 9, "recompute_norms": True},
    {"recompute": "mlp", "loss_tile": "auto"},
    {"recompute": "layer", "mlp_tile": 9},
    {"recompute": "layer_keep_attention", "mlp_tile": "auto", "loss_tile": 9, "recompute_norms": True},
]


@pytest.mark.parametrize("memory", SWITCHES, ids=str)
@pytest.mark.parametrize("bounded", [False, True])
def test_no_switch_lets_rows_choose_the_order(memory: dict[str, Any], bounded: bool) -> None:
    """Rows of 2 to 200 tokens, one document or many, labels everywhere or nowhere: one order, and every weight."""
    model = tiny_llama("sdpa", max_position_embeddings=256)
    if bounded:
        model = longctx.convert(model, {"0": {"abc": {"slots": 4}}, "1": "cosine"})
    mesh = longctx.Mesh()
    longctx.attach(model.train(), mesh)
    apply_settings(model, ActivationSettings(**memory))
    finished: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: finished.append(name))
    orders = set()
    for tokens in (2, 7, 9, 10, 130, 200):
        for share in (0.0, 1.0):
            ids = torch.randint(0, 61, (1, tokens), generator=torch.Generator().manual_seed(tokens))
            positions = torch.arange(tokens)[None] % (3 if tokens == 10 else tokens)
            rows = {"input_ids": ids, "labels": ids if share else torch.full_like(ids, -100), "position_ids": positions}
            finished.clear()
            model(**shard_window(rows, mesh)).loss.backward()
            orders.add(tuple(finished))
    assert len(orders) == 1
    assert sorted(orders.pop()) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_that_no_token_chose_do_not_change_the_order(kind: str, implementation: str) -> None:
    model = tiny_experts(kind, implementation)
    finished: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: finished.append(name))
    orders = set()
    for tokens in (1, 2, 40):  # one token reaches 2 of 8 experts
        finished.clear()
        ids = torch.randint(0, 61, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        orders.add(tuple(finished))
    assert len(orders) == 1 and len(orders.pop()) == len(list(model.parameters()))


def tiny_experts(kind: str, implementation: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_local_experts=8,
        num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    config._experts_implementation = implementation
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def test_one_number_on_all_ranks_and_nothing_else_is_agreement() -> None:
    order = ReductionOrder(object())
    order._add([1, 2])
    number, square = order.take()
    assert number and square == number * number
    assert order.take() == [0.0, 0.0]
    check_order(4096 * number, 4096 * square, 4096)
    with pytest.raises(EngineError, match="different orders"):
        check_order(4095 * number + (number - 1), 4095 * square + (number - 1) ** 2, 4096)

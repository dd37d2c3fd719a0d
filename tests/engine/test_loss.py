"""What a model adds to its loss is refused, in every call, however small it is and whenever it is switched on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_tiny import make_engine, ragged_rows, run_ranks

from longctx.engine.step.loss import check_nothing_added, token_loss
from longctx.errors import EngineError, ModelError

WEIGHTED = {"num_items_in_batch": 7.0}


def some_loss() -> torch.Tensor:
    logits = torch.randn(1, 6, 5, requires_grad=True)
    return token_loss(logits, torch.randint(0, 5, (1, 6)), 7.0)


@pytest.mark.parametrize("tiny", [1.0, 1e-30])
def test_a_sum_is_refused_however_small_the_addend(tiny: float) -> None:
    extra = tiny * torch.ones((), requires_grad=True)
    in_place = some_loss()
    in_place += extra
    for loss in (some_loss() + extra, (some_loss() - extra) * 2, in_place, (some_loss() + extra).double()):
        with pytest.raises(EngineError, match="Router added something to its loss"):
            check_nothing_added(SimpleNamespace(loss=loss), WEIGHTED, 2, "Router")


def test_a_plain_loss_is_not() -> None:
    for loss in (some_loss(), some_loss().double(), 2 * some_loss(), some_loss().detach(), None):
        check_nothing_added(SimpleNamespace(loss=loss), WEIGHTED, 2, "Plain")
    both = SimpleNamespace(loss=some_loss() + some_loss())
    check_nothing_added(both, WEIGHTED, 1, "one process, one micro-batch: every token is there")
    check_nothing_added(both, {}, 2, "not weighted")


def mixtral(**more: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=128, **more,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def switched_on(rank: int, world: int) -> list[str]:
    """Two replicas without a ring, after three good windows: a keyword, a config, and a class that always adds."""
    engine = make_engine(1, 1, model=mixtral())
    for step in range(3):  # the windows in which the engine recomputes losses
        batch = engine.shard(ragged_rows(step, 0, engine.mesh.data_rank))
        engine.backward(engine(**batch).loss)
        engine.step()
    plain, messages = engine.module.loss_function, []
    for action in ("keyword", "config", "class"):
        keywords: dict[str, Any] = {"output_router_logits": True} if action == "keyword" else {}
        engine.module.config.output_router_logits = action == "config"
        if action == "class":
            engine.module.loss_function = lambda *a, **k: plain(*a, **k) + 1e-9 * engine.module.lm_head.weight.sum()
        with pytest.raises((ModelError, EngineError)) as error:
            engine(**batch, **keywords)
        messages.append(str(error.value))
    engine.destroy()
    return messages


def test_what_is_switched_on_after_the_check_is_refused_at_the_call() -> None:
    for keyword, config, kind in run_ranks(2, switched_on):
        assert "MixtralForCausalLM: output_router_logits=True" in keyword and "output_router_logits=True" in config
        assert "MixtralForCausalLM added something to its loss" in kind

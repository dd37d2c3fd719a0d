"""Adapters of PEFT on a ring of 2: trained as by one process, saved from every stage, and judged by what they do."""

from __future__ import annotations

from pathlib import Path
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

from longctx.errors import EngineError, ModelError

from tolerances import tolerance

TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
TILES = {"loss_tile": 3, "mlp_tile": 5, "recompute": "layer", "recompute_norms": True}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [1, 7, 30]},
    "head": {"modules_to_save": ["lm_head"]},
}


def adapted(kind: str) -> Any:
    import peft

    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False, **KINDS[kind]}
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def train(rank: int, world: int, kind: str, stage: int, memory: dict[str, Any], folder: str) -> dict[str, Any]:
    engine = make_engine(2, stage, model=adapted(kind), memory=memory)
    losses, messages = [], []
    for step in range(3):
        run_window(engine, [ragged_rows(step, 0, 0)])
        losses.append(engine.global_loss)
    engine.save_pretrained(folder)
    for name in ("save_pretrained", "merge_and_unload", "merge_adapter") if stage == 3 else ():
        try:
            getattr(engine.module, name)(*((folder + "-stock",) if name == "save_pretrained" else ()))
        except EngineError as error:
            messages.append(f"{name}: {error}")
    weights = weights_of(engine)
    engine.destroy()
    return {"losses": losses, "weights": weights, "messages": messages}


@pytest.mark.parametrize(
    ("kind", "stage", "memory"),
    [
        pytest.param("lora", 2, TILES, marks=pytest.mark.deep),
        ("lora", 3, {"loss_tile": "auto"}),
        pytest.param("dora", 2, {}, marks=pytest.mark.deep),
        pytest.param("dora", 3, TILES, marks=pytest.mark.deep),
        pytest.param("tokens", 0, {"loss_tile": 3}, marks=pytest.mark.deep),
        ("tokens", 3, TILES),
        pytest.param("head", 3, {"loss_tile": "auto"}, marks=pytest.mark.deep),
    ],
)
def test_an_adapter_is_trained_and_saved(kind: str, stage: int, memory: dict[str, Any], tmp_path: Path) -> None:
    import peft

    model = adapted(kind)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer("sgd", [p for p in model.parameters() if p.requires_grad])
    wanted = train_plainly(model, optimizer, steps=3, replicas=1, accumulation=1, clip=0)
    results = run_ranks(2, train, kind, stage, memory, str(tmp_path / "adapter"))
    for result in results:
        torch.testing.assert_close(result["losses"], wanted["losses"], rtol=tolerance("training loss"), atol=0)
        assert result["weights"].keys() == wanted["weights"].keys()
        for name, weight in wanted["weights"].items():
            error = (result["weights"][name] - weight).norm()
            assert error <= tolerance("training weight") * weight.norm(), (name, float(error))
        assert all("engine.save_pretrained(folder)" in message for message in result["messages"])
        assert len(result["messages"]) == (3 if stage == 3 else 0)
    moved = [name for name, weight in wanted["weights"].items() if not torch.equal(weight, start[name])]
    assert any("lora_B" in name for name in moved)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    got = dict(loaded.named_parameters())
    for name in moved:
        assert torch.equal(got[name], results[0]["weights"][name]), name


def refused(rank: int, world: int) -> list[str]:
    import peft
    from transformers import AutoModelForSequenceClassification

    import longctx

    prompts = peft.get_peft_model(tiny_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    heads = AutoModelForSequenceClassification.from_config(tiny_llama().config)
    found = []
    for model in (prompts, Wrapper(heads)):
        with pytest.raises(ModelError) as error:
            longctx.attach(model, longctx.Mesh(ring=2))
        found.append(str(error.value))
    model = Wrapper(tiny_llama())
    engine = make_engine(2, 0, model=model)
    rows = engine.shard(ragged_rows(0, 0, 0))
    with pytest.raises(ModelError) as error:
        engine(**{key: value for key, value in rows.items() if key != "shift_labels"})
    found.append(str(error.value))
    engine.destroy()
    return found


class Wrapper(torch.nn.Module):
    """A module of a user's own around a transformers model, without a config."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


def test_what_a_shard_would_get_wrong_is_refused_through_a_wrapper() -> None:
    for prompts, heads, labels in run_ranks(2, refused):
        assert "PROMPT_TUNING" in prompts and "virtual tokens" in prompts
        assert "ForSequenceClassification" in heads
        assert "shift_labels" in labels


def wrapped(rank: int, world: int) -> list[float]:
    engine = make_engine(2, 2, model=Wrapper(tiny_llama()), memory={"loss_tile": 3, "recompute": "layer"})
    losses = []
    for step in range(2):
        run_window(engine, [ragged_rows(step, 0, 0)])
        losses.append(engine.global_loss)
    engine.destroy()
    return losses


def test_a_model_in_a_module_of_ones_own_attends_over_the_ring() -> None:
    model = tiny_llama()
    optimizer = make_optimizer("sgd", model.parameters())
    wanted = train_plainly(model, optimizer, steps=2, replicas=1, accumulation=1, clip=0)
    for losses in run_ranks(2, wrapped):
        torch.testing.assert_close(losses, wanted["losses"], rtol=tolerance("training loss"), atol=0)

"""A loop of one's own saves the whole model on every ZeRO stage; what would write empty tensors is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tiny import make_engine, ragged_rows, run_ranks, run_window, tiny_llama, weights_of

from longctx.errors import EngineError


def save(rank: int, world: int, stage: int, folder: str, tied: bool, dtype: str) -> dict[str, Any]:
    model = tiny_llama(tie_word_embeddings=tied)
    half = {"bf16": {"enabled": True}} if dtype == "bf16" else {}
    engine = make_engine(2, stage, model=model, **half)
    run_window(engine, [ragged_rows(0, 0, 0)])
    written = engine.save_pretrained(folder)
    weights, messages = weights_of(engine), []
    for action in (
        lambda: engine.module.save_pretrained(folder + "-stock"),
        lambda: engine.save_pretrained("/dev/null/nowhere"),
    ):
        try:
            action()
            messages.append("")
        except EngineError as error:
            messages.append(str(error))
    run_window(engine, [ragged_rows(1, 0, 0)])  # and it goes on training
    engine.destroy()
    return {"weights": weights, "messages": messages, "written": str(written)}


@pytest.mark.parametrize(
    ("stage", "tied", "dtype"), [(0, True, "fp32"), (2, False, "bf16"), (3, True, "fp32"), (3, False, "bf16")]
)
def test_the_folder_holds_what_was_trained(stage: int, tied: bool, dtype: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for result in run_ranks(2, save, stage, str(tmp_path / "model"), tied, dtype):
        loaded = AutoModelForCausalLM.from_pretrained(result["written"])
        assert loaded.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
        got = {name: p.detach().float() for name, p in loaded.named_parameters()}
        assert got.keys() == result["weights"].keys()
        for name, weight in result["weights"].items():
            assert torch.equal(got[name], weight), name
        stock, nowhere = result["messages"]
        assert ("engine.save_pretrained(folder)" in stock) == (stage == 3)
        assert "/dev/null/nowhere" in nowhere


def no_model(rank: int, world: int) -> str:
    engine = make_engine(1, 3, model=torch.nn.Linear(4, 4))
    with pytest.raises(EngineError) as error:
        engine.save_pretrained("anywhere")
    engine.destroy()
    return str(error.value)


def test_a_plain_module_is_refused_by_name() -> None:
    for message in run_ranks(2, no_model):
        assert "Linear" in message and "save_checkpoint" in message

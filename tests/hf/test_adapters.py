"""longctx.hf with LoRA, gradient checkpointing, torch.compile, offload and memory settings trains as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import (
    arguments,
    collate,
    deepspeed_config,
    history,
    packed_rows,
    reference,
    run_ranks,
    tiny_model,
    windows_of,
)


def lora_model() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def trained(rank: int, world: int, folder: str, backend: str, kind: str, given: dict[str, Any]) -> Any:
    from transformers import TrainingArguments

    import longctx

    memory = given.pop("memory", None)
    args = TrainingArguments(**arguments(folder, backend, **given))
    trainer = longctx.hf.Trainer(
        model=lora_model() if kind == "lora" else tiny_model(), args=args, train_dataset=packed_rows(12),
        data_collator=collate, mesh=longctx.Mesh(ring=2), memory=memory,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(f"{folder}/final")
    return history(trainer)


def check(found: list[Any], model: Any, replicas: int = 1) -> None:
    losses, norms, _ = reference(windows_of(packed_rows(12), 3, 2 * replicas), model=model)
    for rank in found:
        assert rank["losses"] == pytest.approx(losses, abs=1e-6)
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)


DEEP = [pytest.param(backend, marks=pytest.mark.deep) for backend in ("zero2", "zero3", "fsdp2")]


@pytest.mark.parametrize("backend", ["ddp", *DEEP])
def test_lora(tmp_path: Path, backend: str) -> None:
    from peft import PeftModel

    check(run_ranks(2, trained, str(tmp_path), backend, "lora", {}), model := lora_model())
    saved = PeftModel.from_pretrained(tiny_model(), tmp_path / "final")
    _, _, model = reference(windows_of(packed_rows(12), 3, 2), model=lora_model())
    wanted = dict(model.named_parameters())
    for name, weight in saved.named_parameters():
        assert torch.allclose(weight, wanted[name], atol=1e-5), name


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "checkpointing": ("zero3", {"gradient_checkpointing": True}),
    "checkpointing, reentrant": (
        "ddp",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "checkpointing, fsdp2": ("fsdp2", {"gradient_checkpointing": True}),
    "offload": (
        "zero3",
        {"deepspeed": deepspeed_config(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})},
    ),
    "tiled": ("zero3", {"memory": {"loss_tile": 8, "mlp_tile": 8, "recompute": "layer_keep_attention"}}),
    "tiled, fsdp2": ("fsdp2", {"memory": {"loss_tile": 8, "mlp_tile": 8, "recompute": "layer_keep_attention"}}),
    "tiled, ddp": ("ddp", {"memory": {"loss_tile": 8, "recompute": "layer", "recompute_norms": True}}),
    "compiled": ("ddp", {"torch_compile": True, "torch_compile_backend": "eager"}),
    "compiled, zero2": ("zero2", {"torch_compile": True, "torch_compile_backend": "eager"}),
}


@pytest.mark.deep
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_no_number(tmp_path: Path, name: str) -> None:
    backend, given = SETTINGS[name]
    check(run_ranks(2, trained, str(tmp_path), backend, "", given), tiny_model())

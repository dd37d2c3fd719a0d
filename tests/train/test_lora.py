"""`model.lora`: adapters trained from YAML, kept in checkpoints, and exported merged or as PEFT loads them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from models.zoo import tiny_config, tiny_model
from safetensors.torch import load_file
from tiny_run import losses, write

from longctx.config.load import load
from longctx.data.tokenizers.tokenizer import ByteTokenizer
from longctx.train.checkpoint.export_run import export_run
from longctx.train.loop import Loop
from longctx.train.run import run

from distributed import RankFailure, run_ranks

LIMIT = 280.0
MODEL = "model: {architecture: llama, hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64}"
LORA = ("model.lora.rank=4", "model.lora.targets=[q_proj, v_proj, down_proj]", "model.lora.dropout=0.1")
TILES = ("memory.loss_tile=16", "memory.mlp_tile=24", "memory.recompute=layer", "memory.recompute_norms=true")


def folder_and_yaml(tmp_path: Path, *names: str) -> Path:
    """Write a pretrained folder with the byte tokenizer, and a YAML per name."""
    folder = tmp_path / "model"
    model = tiny_model(tiny_config("llama"), "longctx")
    model.resize_token_embeddings(260)
    model.save_pretrained(folder)
    ByteTokenizer().save(folder)
    for name in names:
        path = write(tmp_path, name)
        text = path.read_text().replace(MODEL, f"model: {{pretrained: {folder}}}").replace("tokenizer: bytes, ", "")
        path.write_text(text)
    return folder


def train(rank: int, world: int, folder: str, name: str, overrides: tuple[str, ...], stop_at: int = 0) -> int:
    settings = load(Path(folder) / f"{name}.yaml", overrides)
    step = Loop._step

    def signalled(loop: Loop) -> dict[str, Any]:
        if rank == world - 1 and loop.outcome.progress.step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(loop)

    Loop._step = signalled  # type: ignore[method-assign]
    try:
        return run(settings)
    finally:
        Loop._step = step  # type: ignore[method-assign]


def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """The logits of plain transformers, with PEFT's adapter if one is given."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None]).logits


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (3, TILES),
        pytest.param(0, (), marks=pytest.mark.deep),
        pytest.param(1, ("zero.offload_optimizer=cpu",), marks=pytest.mark.deep),
        pytest.param(2, ("model.lora.modules_to_save=[lm_head]", "model.dtype=bf16"), marks=pytest.mark.deep),
        pytest.param(3, ("model.lora.modules_to_save=[embed_tokens, lm_head]",), marks=pytest.mark.deep),
        pytest.param(3, ("model.dtype=bf16", "train.stages=[]"), marks=pytest.mark.deep),
    ],
)
def test_adapters_are_trained_resumed_and_exported(tmp_path: Path, stage: int, more: tuple[str, ...]) -> None:
    base = folder_and_yaml(tmp_path, "straight", "broken")
    overrides = (*LORA, f"zero.stage={stage}", *more)
    assert run_ranks(2, train, str(tmp_path), "straight", overrides, timeout=LIMIT) == [0, 0]
    assert run_ranks(2, train, str(tmp_path), "broken", overrides, 3, timeout=LIMIT) == [75, 75]
    as_adapter = (*overrides, "checkpoint.resume=must", "model.lora.export=adapter")
    assert run_ranks(2, train, str(tmp_path), "broken", as_adapter, timeout=LIMIT) == [0, 0]
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    whole, adapter = tmp_path / "straight" / "model", tmp_path / "broken" / "model"
    difference = (logits_of(whole) - logits_of(base, adapter)).abs().max()
    assert difference < 1e-5
    assert (logits_of(whole) - logits_of(base)).abs().max() > 1e-4
    assert (whole / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    before, after = load_file(base / "model.safetensors"), load_file(whole / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in moved} <= {"q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"}
    size = sum(path.stat().st_size for path in (tmp_path / "straight" / "checkpoints").rglob("*.pt"))
    assert "lm_head]" in str(more) or size < 2 * 2 * (base / "model.safetensors").stat().st_size
    exported = export_run(tmp_path / "straight", tmp_path / "again")
    assert (logits_of(exported) - logits_of(whole)).abs().max() < (1e-5 if "bf16" not in str(more) else 0.05)


@pytest.mark.deep
@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_are_resharded(tmp_path: Path, stage: int) -> None:
    folder_and_yaml(tmp_path, "straight", "broken")
    overrides = (LORA[0], f"zero.stage={stage}")
    assert run_ranks(2, train, str(tmp_path), "straight", overrides, timeout=LIMIT) == [0, 0]
    assert run_ranks(2, train, str(tmp_path), "broken", overrides, 3, timeout=LIMIT) == [75, 75]
    alone = (*overrides, "mesh.ring=1", "checkpoint.resume=must")
    assert run_ranks(1, train, str(tmp_path), "broken", alone, timeout=LIMIT) == [0]
    ours, theirs = ([float.fromhex(loss) for loss in losses(tmp_path / name)] for name in ("broken", "straight"))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.deep
def test_another_base_is_refused(tmp_path: Path) -> None:
    base = folder_and_yaml(tmp_path, "run")
    alone = (*LORA, "mesh.ring=1", "output.sample_tokens=0")
    assert run_ranks(1, train, str(tmp_path), "run", (*alone, "train.steps=2"), timeout=LIMIT) == [0]
    torch.manual_seed(5)
    weights = load_file(base / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: value + 0.1 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(RankFailure, match="check model.* and the folder in model.pretrained"):
        run_ranks(1, train, str(tmp_path), "run", alone, timeout=LIMIT)

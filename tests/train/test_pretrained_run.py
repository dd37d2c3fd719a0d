"""A run from a pretrained folder: its own tokenizer, rows beyond its positions, and refusals before ranks meet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models.zoo import tiny_config, tiny_model
from safetensors.torch import load_file
from tiny_run import losses, write

from longctx.config.load import load
from longctx.data.tokenizers.tokenizer import load_tokenizer, train_bpe
from longctx.launch import rank as rank_entry
from longctx.train.run import run

from distributed import run_ranks

MODEL = "model: {architecture: llama, hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64}"
FAR = ("model.rope={rope_type: linear}",)


def folder_and_yaml(tmp_path: Path) -> tuple[Path, Path]:
    """Write a pretrained folder of 48 positions with a tokenizer of its own, and a YAML with rows of 96 tokens."""
    path = write(tmp_path)
    folder = tmp_path / "model"
    model = tiny_model(tiny_config("llama"), "longctx")
    model.resize_token_embeddings(300)
    model.config.max_position_embeddings = 48
    model.save_pretrained(folder)
    train_bpe([file.read_text() for file in sorted((tmp_path / "text").iterdir())], 300).save(folder)
    text = path.read_text().replace(MODEL, f"model: {{pretrained: {folder}}}").replace("tokenizer: bytes, ", "")
    path.write_text(text)
    return folder, path


def train(rank: int, world: int, path: str) -> int:
    return run(load(path, FAR))


def test_a_pretrained_folder_is_trained_with_its_own_tokenizer(tmp_path: Path) -> None:
    folder, path = folder_and_yaml(tmp_path)
    assert run_ranks(2, train, str(path), timeout=200) == [0, 0]
    output = tmp_path / "run"
    assert len(losses(output)) == 6
    own = load_tokenizer(folder)
    assert load_tokenizer(output / "tokens" / "tokenizer").hash == own.hash != train_bpe(["x"], 300).hash
    exported: dict[str, Any] = json.loads((output / "model" / "config.json").read_text())
    assert exported["max_position_embeddings"] == 96 and exported["rope_parameters"]["factor"] == 2.0
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert 0 < (after[name].float() - before[name].float()).abs().max() < 0.1  # it began where the folder ends


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "data.sequence_length: got 96, above the 48 positions"),
        ([*FAR, "data.tokenizer=bytes"], "data.tokenizer: got 'bytes', whose ids are not those"),
        ([*FAR, "data.tokenizer=bpe"], "data.tokenizer: got 'bpe', which assigns new ids"),
    ],
)
def test_a_rank_of_another_launcher_refuses_before_it_meets_others(
    tmp_path: Path, overrides: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    _, path = folder_and_yaml(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert rank_entry.main(["--config", str(path), *overrides]) == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()

"""An exported folder differs from the one that training began with in its weights, and in nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors import safe_open
from tokenizer_folders import write_folder

import longctx
from longctx.models.attach import attach_attention
from longctx.models.load.pretrained import load_pretrained, read_config
from longctx.train.checkpoint.export import read_source, write_model
from longctx.train.checkpoint.export_run import export_run
from longctx.train.run import run

from distributed import run_ranks

# family -> (dtype of the folder, of training, ZeRO stage, generation_config.json)
RUNS: dict[str, tuple[str, str, int, dict[str, Any] | None]] = {
    "llama": ("bfloat16", "fp32", 0, {"do_sample": False, "temperature": 0.6, "eos_token_id": [2, 5]}),
    "llama3": ("float16", "bf16", 3, {"do_sample": True, "top_p": 0.9, "eos_token_id": [301, 302]}),
    "qwen3": ("float32", "bf16", 1, None),
    "gemma": ("bfloat16", "bf16", 3, {"cache_implementation": "hybrid", "eos_token_id": [1, 4], "pad_token_id": 0}),
    "gpt2": ("float32", "fp32", 2, {"_from_model_config": True, "eos_token_id": 0}),
}


def yaml(folder: Path, family: str) -> None:
    """Write the YAML that trains a family's folder."""
    path = tiny_run.write(folder, family)
    source, (_, dtype, stage, _) = folder / "source" / family, RUNS[family]
    text = path.read_text().replace("tokenizer: bytes", f"tokenizer: {source}")
    first, rest = text.lstrip().split("\n", 1)
    assert first.startswith("model:")
    path.write_text(f"model: {{pretrained: {source}, dtype: {dtype}}}\nzero: {{stage: {stage}}}\n{rest}")


def train(rank: int, world: int, folder: str) -> None:
    os.umask(0o027)
    for family in RUNS:
        run(tiny_run.config(Path(folder), "train.steps=2", "checkpoint.every=1", name=family))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with source/FAMILY, and a run of every family."""
    folder = tmp_path_factory.mktemp("export")
    for family, (dtype, _, _, generation) in RUNS.items():
        write_folder(folder / "source" / family, family, dtype, generation)
        yaml(folder, family)
    run_ranks(2, train, str(folder), timeout=280)
    return folder


def tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape) of every tensor."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}


@pytest.mark.parametrize("family", RUNS)
def test_all_but_the_weights_is_as_it_was(trained: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, made = trained / "source" / family, trained / family / "model"
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in made.iterdir()} == names | {"README.md"}
    for name in names - {"model.safetensors"}:
        assert (made / name).read_bytes() == (source / name).read_bytes(), name
    assert tensors(made) == tensors(source), "names (tied heads once), dtypes and shapes"
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, made))
    assert before.dtype == after.dtype
    assert {**before.config.to_dict(), "_name_or_path": ""} == {**after.config.to_dict(), "_name_or_path": ""}
    assert before.generation_config.to_dict() == after.generation_config.to_dict()
    tied = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (before, after)]
    assert tied == [family not in ("llama", "llama3")] * 2
    assert any(not torch.equal(x, y) for x, y in zip(before.parameters(), after.parameters(), strict=True)), "trained"
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (source, made))
    assert old.special_tokens_map == new.special_tokens_map and old.chat_template == new.chat_template
    assert (old.padding_side, old.model_max_length) == (new.padding_side, new.model_max_length) == ("left", 777)


def test_what_a_run_changes_is_exported_and_nothing_else(tmp_path: Path) -> None:
    """More positions than the source; heads stay tied where ranks gathered copies; no weight becomes infinite."""
    source = write_folder(tmp_path / "source", "qwen3", "float16", {"top_k": 7, "use_cache": False})
    model = load_pretrained(source, config=read_config(source, {"max_position_embeddings": 512}))
    attach_attention(model, longctx.Mesh(ring=1, world_size=1))
    facts = read_source(source)
    weights = {name: x.float().clone() for name, x in model.state_dict().items()}
    assert "lm_head.weight" in weights
    write_model(model, dict(weights), source, tmp_path / "made", facts)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "made"))
    assert new == old | {"max_position_embeddings": 512}
    generation = [(folder / "generation_config.json").read_bytes() for folder in (source, tmp_path / "made")]
    assert generation[0] == generation[1]
    assert tensors(tmp_path / "made") == tensors(source)
    weights["model.norm.weight"][0] = 1e6  # beyond fp16
    write_model(model, dict(weights), source, tmp_path / "large", facts)
    assert {dtype for dtype, _ in tensors(tmp_path / "large").values()} == {"F32"}
    assert json.loads((tmp_path / "large" / "config.json").read_text())["dtype"] == "float32"


def test_others_may_read_what_the_umask_lets_them(trained: Path) -> None:
    for folder in ("gpt2/model", "gpt2/tokens", "gpt2/tokens/tokenizer"):
        for path in (trained / folder).iterdir():
            if path.is_file() and path.name != ".lock":
                assert path.stat().st_mode & 0o777 == 0o640, path


@pytest.mark.parametrize("family", RUNS)
def test_a_checkpoint_is_exported_as_its_run_would_have(trained: Path, tmp_path: Path, family: str) -> None:
    """The last step's gives the run's own export, byte for byte; the one before gives other weights."""
    made = export_run(trained / family, tmp_path / "last")
    for path in (trained / family / "model").iterdir():
        assert (made / path.name).read_bytes() == path.read_bytes(), path.name
    before = export_run(trained / family, tmp_path / "before", step=1)
    assert tensors(before) == tensors(made)
    assert (before / "model.safetensors").read_bytes() != (made / "model.safetensors").read_bytes()


def test_export_as_a_user_types_it(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    run_folder, output = trained / "llama", tmp_path / "out"
    main_exits(["export", str(run_folder), "--output", str(output), "--dtype", "fp32"], 0)
    assert capsys.readouterr().out.strip() == str(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == model.config.dtype == torch.float32
    mistakes = {
        ("--output", str(output)): "exists already", ("--step", "7"): "no checkpoint of step 7",
        ("--dtype", "int8"): "choose one of fp32, bf16, fp16",
    }  # fmt: skip
    for arguments, message in mistakes.items():
        main_exits(["export", str(run_folder), *arguments], 1 if "--step" in arguments else 2)
        assert message in capsys.readouterr().err
    main_exits(["export", str(tmp_path)], 2)
    assert "no config.yaml there" in capsys.readouterr().err
    damaged = next((run_folder / "checkpoints").glob("step-*2/*model_states.pt"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    try:
        main_exits(["export", str(run_folder), "--step", "2", "--output", str(tmp_path / "none")], 1)
        assert "no checkpoint in" in capsys.readouterr().err and not (tmp_path / "none").exists()
        assert export_run(run_folder, tmp_path / "older").is_dir(), "the one before is whole"
    finally:
        damaged.write_bytes(content)


def main_exits(arguments: list[str], code: int) -> None:
    from longctx.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert (end.value.code or 0) == code


def test_a_model_from_scratch_has_a_cache_and_its_own_stop_token(tmp_path: Path) -> None:
    tiny_run.write(tmp_path)
    run_ranks(2, train_scratch, str(tmp_path), timeout=280)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "run" / "model" / name).read_text())
        assert content.get("use_cache", True) is True and content["eos_token_id"] == 256


def train_scratch(rank: int, world: int, folder: str) -> None:
    run(tiny_run.config(Path(folder), "train.steps=2"))

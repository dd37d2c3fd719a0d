"""`longctx init --model`: the written file passes the check, fits by the plan, and sets only what differs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from pretrained_folders import GPT2, gpt2_weights, llama_weights, pretrained_folder

from longctx.config.keys import leaves
from longctx.config.load import load
from longctx.errors import ConfigError
from longctx.plan.machines import MACHINES
from longctx.plan.propose import propose
from longctx.plan.stages import plan_stages

EIGHT: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 5e5,
}  # fmt: skip


def eight_billion(folder: Path, **changes: Any) -> Path:
    """A folder like Llama 3 8B: its weights are a header and a hole in the file."""
    pretrained_folder(folder, **{**EIGHT, **changes})
    sizes = {32: 4096, 16: 1024, 64: 14336, 300: 128256}
    entries, end = {}, 0
    layers = llama_weights()
    for name, value in layers.items():
        numbers = range(32) if ".layers.0." in name else [0] if ".layers." not in name else []
        for number in numbers:
            shape = [sizes[size] for size in value.shape]
            begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            key = name.replace(".layers.0.", f".layers.{number}.")
            entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
    return folder


def test_eight_billion_parameters_on_eight_gpus(tmp_path: Path) -> None:
    folder, path = eight_billion(tmp_path / "base"), tmp_path / "run.yaml"
    done = run("init", "--model", folder, "--gpus", 8, "--length", "256Ki", "--data", "python-stdlib", "--output", path)
    assert done.returncode == 0 and f"wrote {path}" in done.stdout, done.stderr
    checked = run("check", path)
    assert checked.returncode == 0 and "8,030.3 M parameters" in checked.stdout, checked.stderr
    config = load(path, default_world=8)
    (planned,) = plan_stages(config, 8, MACHINES["h100"])
    assert planned.fits and planned.setup.world == 8 and config.zero.stage == 3
    rope = config.model.rope
    assert rope is not None and rope.model_dump(exclude_none=True) == {"rope_type": "yarn"}
    values = propose(folder, MACHINES["h100"], 8, 2**18, "python-stdlib").values
    plain = {key for key, value in values.items() if value == leaves()[key].default}
    assert plain <= {"mesh.ring", "mesh.data", "zero.stage", "train.steps"}
    lines = path.read_text().splitlines()
    rope_line = lines.index("  rope: {rope_type: yarn}")
    assert lines[rope_line - 1].startswith("  # extends the folder's 8,192 positions to 262,144")


def test_a_length_that_does_not_fit_is_answered_with_one_that_does(tmp_path: Path) -> None:
    folder = eight_billion(tmp_path / "base")
    small = replace(MACHINES["h100"], per_node=2)
    with pytest.raises(
        ConfigError, match=r"no settings fit rows of 67,108,864 tokens on 2 x h100, but rows of [0-9,]+ fit"
    ):
        propose(folder, small, 2, 2**26, "python-stdlib")
    with pytest.raises(ConfigError, match="does not fit on 1 x cpu"):
        propose(folder, MACHINES["cpu"], 1, None, "python-stdlib")


@pytest.mark.parametrize(
    ("old", "block"),
    [
        ({}, {"rope_type": "yarn"}),
        ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 8.0}),
        (
            {"rope_type": "yarn", "factor": 2.0},
            {"rope_type": "yarn", "original_max_position_embeddings": 8192},
        ),
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024},
            {"rope_type": "llama3"},
        ),
        ({"rope_type": "dynamic", "factor": 2.0}, None),
    ],
)
def test_positions_are_extended_as_the_folder_does_it(
    tmp_path: Path, old: dict[str, Any], block: dict[str, Any] | None
) -> None:
    folder, path = pretrained_folder(tmp_path / "m", **({"rope_scaling": old} if old else {})), tmp_path / "run.yaml"
    found = propose(folder, MACHINES["h100"], 8, 2**15, "python-stdlib").values
    assert found.get("model.rope") == block
    assert run("init", path, "--model", folder, "--length", "32Ki").returncode == 0
    checked = run("check", path)
    assert checked.returncode == 0, checked.stderr


def test_positions_that_nothing_extends(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "m", GPT2, gpt2_weights())
    assert propose(folder, MACHINES["cpu"], 2, None, "python-stdlib").values["data.sequence_length"] == 8192
    with pytest.raises(ConfigError, match="positions of .* are learned.*use --length 8192 or less"):
        propose(folder, MACHINES["cpu"], 2, 2**15, "python-stdlib")
    with pytest.raises(ConfigError, match="init --model: .*no config.json there"):
        propose(tmp_path / "none", MACHINES["cpu"], 2, None, "python-stdlib")

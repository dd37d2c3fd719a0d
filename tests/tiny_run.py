"""A run that takes a second: some text, bytes for tokens, a model of a few thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longctx.config.load import load
from longctx.config.schema import RunConfig

YAML = """
model: {architecture: llama, hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64}
mesh: {ring: 2, data: 1}
data: {sources: TEXT, tokenizer: bytes, sequence_length: 96, held_out: 0.2, packing: best_fit}
train: {steps: 6, lr: 0.01, warmup_steps: 2, eval_every: 3, eval_batches: 2}
checkpoint: {every: 2}
output: {folder: RUN, sample_prompt: 8, sample_tokens: 4}
"""


def write(folder: Path, name: str = "run") -> Path:
    """Write text and a YAML for a run in ``folder/name``; return the YAML."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for number in range(12):
        lines = (f"{number} times {factor} is {number * factor}\n" for factor in range(2 + 3 * (number % 5)))
        (text / f"{number:02d}.txt").write_text("".join(lines) + "and so on\n")
    path = folder / f"{name}.yaml"
    path.write_text(YAML.replace("TEXT", str(text)).replace("RUN", str(folder / name)))
    return path


def config(folder: Path, *overrides: str, name: str = "run") -> RunConfig:
    """Return what ``write`` wrote, with overrides."""
    return load(folder / f"{name}.yaml", overrides)


def losses(output: Path) -> list[str]:
    """Return every step's loss as hexadecimal, so that equal means equal to the last bit."""
    from longctx.train.report.metrics import read

    return [float(record["loss"]).hex() for record in read(output)]


def weights(output: Path) -> dict[str, Any]:
    """Return the exported weights."""
    from safetensors.torch import load_file

    return load_file(output / "model" / "model.safetensors")

"""The commands of examples/README.md run as written, and print what it says they print, on one process and on two."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from house_files import ROOT

from tolerances import tolerance

README = (ROOT / "examples" / "README.md").read_text()
SECTIONS = {name: text for name, text in re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)}
NUMBER = re.compile(r"\d+\.\d+")
NOISE = re.compile(r"\[\d{4}-\d\d-\d\d |DeepSpeed |\{")  # logs of DeepSpeed and of Trainer, which go to stdout
SECONDS = 600  # a start imports torch, transformers and DeepSpeed in every process, on a machine that others share too


def stated(name: str) -> list[str]:
    """Return the lines that a section says its command prints."""
    (block,) = re.findall(r"```text\n(.*?)```", SECTIONS[name], re.DOTALL)
    return [line for line in block.splitlines() if line != "…"]


def commands(name: str) -> list[list[str]]:
    """Return the commands of a section, split into words."""
    (block,) = re.findall(r"```sh\n(.*?)```", SECTIONS[name], re.DOTALL)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the examples and the text that they read, so that a run leaves nothing in the repository."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy2(ROOT / "LICENSE", tmp_path)
    return tmp_path


def in_this_process(command: list[str], checkout: Path) -> list[str]:
    """Run ``python FILE`` here, where everything is imported already, and return the lines of its output."""
    program, file = command
    assert program == "python"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runpy.run_path(str(checkout / file), run_name="__main__")
    return printed(output.getvalue())


def in_a_shell(command: list[str], checkout: Path) -> list[str]:
    """Run a command in ``checkout`` and return the lines of its output."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    if command[0] == "longctx":  # as this checkout has it, whatever is installed
        command = [sys.executable, "-m", "longctx.cli", *command[1:]]
    done = subprocess.run(
        command, cwd=checkout, env=kept | {"PATH": path, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return printed(done.stdout)


def printed(output: str) -> list[str]:
    """Return the lines that are not DeepSpeed's log."""
    return [line for line in output.splitlines() if not NOISE.match(line)]


def assert_same(lines: list[str], expected: list[str], relative: float) -> None:
    """Compare output line by line: words and whole numbers exactly, decimals within a relative tolerance."""
    assert [NUMBER.sub("#", line) for line in lines] == [NUMBER.sub("#", line) for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for ours, theirs in zip(NUMBER.findall(line), NUMBER.findall(other), strict=True):
            assert abs(float(ours) - float(theirs)) <= relative * float(theirs), f"{line!r} is not {other!r}"


def test_every_example_is_listed_and_every_file_is_an_example() -> None:
    files = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".yaml")}
    assert set(SECTIONS) == files
    assert {name for name, _ in re.findall(r"^\| \[(\S+?)\]\((\S+?)\)", README, re.MULTILINE)} == files
    for path in (ROOT / "examples").glob("*.*"):
        assert path.name == "README.md" or len(path.read_text().splitlines()) <= 80, f"{path.name} has over 80 lines"


@pytest.mark.parametrize("name", ["plain_loop.py", "custom_model.py", "huggingface_trainer.py"])
def test_two_ranks_train_like_one_process(name: str, checkout: Path) -> None:
    alone, together = commands(name)
    whole, sharded = in_this_process(alone, checkout), in_a_shell(together, checkout)
    assert_same(sharded, whole, tolerance("training loss"))
    assert_same(whole, stated(name), tolerance("printed loss"))


def test_every_way_to_generate_gives_the_same_tokens(checkout: Path) -> None:
    alone, together = commands("generate.py")
    whole, sharded = in_this_process(alone, checkout), in_a_shell(together, checkout)
    assert len({line.split(": ")[1] for line in sharded}) == 1
    assert [line.split(": ")[0] for line in sharded] == ["KV cache", "EL cache", "KV cache over a ring of 2"]
    assert whole == sharded[:2] and sharded == stated("generate.py")


def test_deepspeed_loop_trains_like_plain_torch(checkout: Path) -> None:
    (command,) = commands("deepspeed_loop.py")
    lines = in_a_shell(command, checkout)
    assert_same(lines, stated("deepspeed_loop.py"), tolerance("printed loss"))
    losses = [float(NUMBER.findall(line)[0]) for line in lines]
    torch.testing.assert_close(losses, plain_losses(checkout), rtol=tolerance("training loss"), atol=0)


def plain_losses(checkout: Path) -> list[float]:
    """Return the losses of deepspeed_loop.py's run, in one process and without longctx and DeepSpeed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, tie_word_embeddings=True,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.tensor(list((checkout / "LICENSE").read_bytes()))

    def loss_of(index: int) -> torch.Tensor:
        start = index * 1024 % (len(text) - 1024)
        ids = text[None, start : start + 1024]
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    losses = []
    for step in range(5):
        loss = (loss_of(2 * step) + loss_of(2 * step + 1)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        return [*losses, float(loss_of(0))]


def test_yaml_trains_and_leaves_what_the_page_says(checkout: Path) -> None:
    (command,) = commands("train.yaml")
    lines = in_a_shell(command, checkout)
    for line in stated("train.yaml"):
        said = re.sub(r"  norm .*", "", line)  # the rest is speed, which no page can state
        (match,) = [re.sub(r"  norm .*", "", ours) for ours in lines if ours.split("  ")[0] == line.split("  ")[0]
                    or line.startswith("held-out") and ours.startswith("held-out")]  # fmt: skip
        assert_same([match], [said], tolerance("printed loss"))
    folder = checkout / "runs" / "example"
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    for name in re.findall(r"`([\w./]+)`", SECTIONS["train.yaml"].split("```\n")[-1].split("`longctx")[0]):
        assert (checkout / name).exists() or (folder / name).exists(), f"the run left no {name}"

"""The README and the docs tell the truth: names, links, commands, tables, and every block of Python runs."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from house_files import ROOT, project_files

import longctx

from distributed import run_ranks
from tolerances import tolerance

README = (ROOT / "README.md").read_text()
PAGES = [path for path in project_files() if path.suffix == ".md"]


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run_block(source: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a block as a script that starts with ``names``; return what it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.py"
        path.write_text(source)
        left = runpy.run_path(str(path), init_globals=names)
    return {name: value for name, value in left.items() if not name.startswith("__")}


def tiny_llama(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def rows(seed: int, batch: int = 1, length: int = 42) -> dict[str, torch.Tensor]:
    ids = torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def settings(accumulation: int, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }


def five_lines(rank: int, world_size: int) -> tuple[float, float]:
    """Run the README's DeepSpeed loop; return its loss and the loss of the unsharded model in plain PyTorch."""
    window = [rows(1), rows(2)]
    _, block = blocks("README.md")
    left = run_block(block, {"model": tiny_llama(0), "ds_config": settings(2, 2), "window": window})
    with torch.no_grad():
        truth = sum(float(tiny_llama(0)(**batch).loss) for batch in window) / 2
    return left["engine"].global_loss, truth


def test_the_five_lines_run() -> None:
    for loss, truth in run_ranks(2, five_lines, timeout=280):
        assert abs(loss - truth) <= tolerance("fp32") * truth


def twenty_lines(rank: int, world_size: int) -> str:
    """Run the README's script as torchrun would start it; return what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world_size))
        run_block(blocks("README.md")[0], {})
    return output.getvalue()


def plain_losses(steps: int) -> list[float]:
    """Return the losses of the README's script without longctx: the same model and row, whole, in one process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.arange(2048)[None] % 50
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_the_script_runs_and_prints_what_the_page_says() -> None:
    (said,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    script = blocks("README.md")[0]
    assert len([line for line in script.splitlines() if line]) <= 24, "the page promises twenty lines"
    printed, silent = run_ranks(2, twenty_lines, timeout=280)
    assert not silent
    losses, stated = ([float(x) for x in re.findall(r"loss (\S+)", text)] for text in (printed, said))
    assert len(losses) == len(stated) == 10
    torch.testing.assert_close(losses, stated, rtol=tolerance("printed loss"), atol=0)
    rounding = 5e-5  # four decimals are printed
    torch.testing.assert_close(losses, plain_losses(10), rtol=tolerance("training loss"), atol=rounding)


def test_the_yaml_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longctx.config.load import load

    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "run.yaml").write_text(block)
    (tmp_path / "LICENSE").write_text("some text")
    monkeypatch.chdir(tmp_path)
    config = load(tmp_path / "run.yaml")
    assert config.mesh.ring == 2 and config.output.folder == "runs/first"


def custom_trainers(rank: int, world_size: int, folder: str) -> dict[str, float]:
    """Run the page's blocks one after another; return what they computed."""
    names: dict[str, Any] = {
        "model": tiny_llama(0),
        "another_model": tiny_llama(0),
        "plain_model": tiny_llama(0),
        "my_loader": [rows(5, batch=2)],
        "ds_config": settings(1, 3),
        "window": [rows(1)],
        "held_out": [rows(3), rows(4, length=17)],
        "pair": rows(5, batch=2),
        "full_x": torch.randn(1, 2, 21, 8),
        "folder": folder,
    }
    torch.distributed.broadcast(names["full_x"], 0)
    losses, replicated = [], None
    for block in blocks("docs/custom_trainers.md"):
        names.update(run_block(block, names))
        losses.append(names["engine"].global_loss)
        if "replicated=True" in block:
            replicated = (losses[-1], float(names["loss"].detach()))
    assert replicated is not None
    x = names["full_x"]
    dense = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    return {
        "first": losses[0],
        "replicated": replicated[0],
        "tokens": names["result"].tokens,
        "theirs": names["theirs"].global_loss,
        "windows": names["mean"],
        "attention": float((names["whole"] - dense).abs().max()),
        "preference": replicated[1],
    }


def test_custom_trainers_page_runs(tmp_path: Path) -> None:
    values = run_ranks(2, custom_trainers, str(tmp_path / "saved"), timeout=280)
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert values[0] | {"attention": 0} == values[1] | {"attention": 0}, "every rank reports the same"
    first, pair = (float(tiny_llama(0)(**batch).loss) for batch in (rows(1), rows(5, batch=2)))
    assert abs(values[0]["first"] - first) <= tolerance("fp32") * first
    assert abs(values[0]["theirs"] - pair) <= tolerance("fp32") * pair
    assert abs(values[0]["windows"] - pair) <= tolerance("fp32") * pair
    assert abs(values[0]["replicated"] - values[0]["preference"]) <= tolerance("fp32"), "counted once, not per rank"
    assert values[0]["tokens"] == 41 + 16
    assert values[0]["attention"] <= tolerance("fp32")


def test_bounded_models_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = torch.randn(2, 1, 10, 64).unbind()
    names: dict[str, Any] = {"model": tiny_llama(0), "x": x, "y": y, "longctx": longctx}
    for block in blocks("docs/bounded_models.md"):
        names.update(run_block(block, names))
    ids = rows(1)["input_ids"]
    assert torch.equal(names["again"](ids).logits, names["model"](ids).logits)
    whole = names["layer"](torch.cat([x, y], 1))
    assert (torch.cat([names["out"], names["more"]], 1) - whole).abs().max() <= tolerance("fp32")


def test_public_names() -> None:
    section = (ROOT / "docs" / "README.md").read_text().split("## Public names")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(longctx.__all__)


def test_links_lead_somewhere() -> None:
    dead = [
        f"{page}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
        if not target.startswith("http") and not ((ROOT / page).parent / target).exists()
    ]
    assert not dead, dead


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    from typer.main import get_command

    from longctx.cli.main import app

    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    wrong = []
    for page in PAGES:
        text = re.sub(r"^#.*$", "", (ROOT / page).read_text(), flags=re.MULTILINE)
        made = re.findall(r"(?:`|    )make ([a-z-]+)", text)
        wrong += [f"{page}: make {name}" for name in made if name not in targets]
        wrong += [f"{page}: longctx {name}" for name in re.findall(r"`longctx ([a-z]+)", text) if name not in commands]
    assert not wrong, wrong


def test_tables_come_from_the_measurements() -> None:
    from benchmarks.report import readme_tables

    for name, table in readme_tables().items():
        shown = f"<!-- bench:{name} -->\n{table}\n<!-- bench:end -->" in README
        assert shown, f"the {name} table is not the measurements': run python -m benchmarks.report"


def test_messages_in_troubleshooting_are_ours() -> None:
    """Each heading of the page is a piece of a message that the code (or DeepSpeed) really prints."""
    source = "".join((ROOT / path).read_text() for path in project_files() if path.suffix in (".py", ".sh"))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    ours = page.split("## Messages of others")[0]
    missing = [text for text in re.findall(r"^### `(.+?)`", ours, re.MULTILINE) if text.strip("…") not in source]
    assert not missing, f"no code says: {missing}"

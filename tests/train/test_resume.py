"""A run that is stopped and resumed is, to the last bit, the run that was never stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import config, losses, weights, write

from longctx.train.loop import Loop

from distributed import RankFailure, run_ranks

LIMIT = 280.0
# everything that has state: dropout (random states), accumulation, a schedule, packing, clipping
DROPOUT = ("model.architecture=gpt2", "model.extra={resid_pdrop: 0.1, embd_pdrop: 0.1}", "train.global_batch=2")
# the first scale makes gradients overflow, and every second step without one doubles it
FP16 = ("model.dtype=fp16", "fp16.scale_power=19", "fp16.window=2")
CASES = {
    "zero3": ("zero.stage=3",),
    "zero2-mixed-layers": ("zero.stage=2", "attention.layers={'0': {abc: {slots: 4}}, '1': cosine}"),
    "zero2-bf16": ("zero.stage=2", "model.dtype=bf16", *DROPOUT),
    "zero2-fp16": ("zero.stage=2", "fp16.hysteresis=1", *FP16),
    "zero0-fp16": ("zero.stage=0", *FP16),
    "zero1": ("zero.stage=1", *DROPOUT),
    "zero0-sgd": ("zero.stage=0", "train.optimizer=sgd", "train.momentum=0.9"),
    "zero3-offload-checkpointing": ("zero.offload_optimizer=cpu", "memory.recompute=layer_keep_attention", *DROPOUT),
}


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on a CPU without instructions for it; torch computes it there all the same."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def train(rank: int, world: int, folder: str, name: str, overrides: tuple[str, ...], stop_at: int = 0) -> int:
    """Run the job on this rank; a SIGTERM reaches rank 1 alone during step ``stop_at``."""
    from longctx.train.run import run

    if FP16[0] in overrides:
        allow_fp16()
    settings = config(Path(folder), *overrides, name=name)
    step = Loop._step

    def signalled(loop: Loop) -> dict[str, Any]:
        if rank == 1 and loop.outcome.progress.step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(loop)

    Loop._step = signalled  # type: ignore[method-assign]
    try:
        return run(settings)
    finally:
        Loop._step = step  # type: ignore[method-assign]


# groups of weights large enough to be swapped, of odd sizes; norms, which are not swapped, have moments and steps too
NVME = (
    "zero.offload_optimizer=nvme",
    "model.hidden_size=520",
    "model.intermediate_size=1031",
    "deepspeed.zero_optimization={sub_group_size: 700000}",
)
LATER = {  # the same path as another case, with another stage
    **dict.fromkeys(("zero3", "zero0-fp16", "zero2-bf16", "zero1"), pytest.mark.slow),
    **dict.fromkeys(("zero2-mixed-layers", "zero2-fp16"), pytest.mark.deep),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=LATER.get(case, ())) for case in CASES])
def test_resumed_equals_uninterrupted(tmp_path: Path, case: str) -> None:

    write(tmp_path, "straight"), write(tmp_path, "broken")
    resumed_equals_uninterrupted(tmp_path, CASES[case])
    if FP16[0] in CASES[case]:
        lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert records[0]["skipped_steps"] == 1 and records[0]["grad_norm"] is None
        assert records[-1]["loss_scale"] < 2**19 and records[-1]["skipped_steps"] < 6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resumed_from_nvme_equals_uninterrupted_in_host_memory(tmp_path: Path, dtype: str) -> None:
    """DeepSpeed compiles its operator at the first use, for minutes."""
    (tmp_path / "disk").mkdir()
    write(tmp_path, "straight"), write(tmp_path, "broken"), write(tmp_path, "cpu")
    overrides = (*NVME, f"zero.nvme_folder={tmp_path / 'disk'}", f"model.dtype={dtype}")
    resumed_equals_uninterrupted(tmp_path, overrides)
    assert not list((tmp_path / "disk").iterdir())
    files = [path.name for path in (tmp_path / "broken" / "checkpoints" / "step-00000006").glob("nvme_*")]
    assert len(files) >= 6 and any("rank_00001" in name for name in files)
    on_cpu = ("zero.offload_optimizer=cpu", *overrides[1:4], f"model.dtype={dtype}")
    assert run_ranks(2, train, str(tmp_path), "cpu", on_cpu, timeout=LIMIT) == [0, 0]
    assert losses(tmp_path / "cpu") == losses(tmp_path / "straight")
    with pytest.raises(RankFailure, match="was saved with zero.offload_optimizer: nvme"):
        run_ranks(2, train, str(tmp_path), "straight", (*on_cpu, "train.steps=7"), timeout=LIMIT)


def resumed_equals_uninterrupted(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert run_ranks(2, train, str(tmp_path), "straight", overrides, timeout=LIMIT) == [0, 0]
    assert run_ranks(2, train, str(tmp_path), "broken", overrides, 3, timeout=LIMIT) == [75, 75]
    summary = json.loads((tmp_path / "broken" / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("stopped", 3)
    assert run_ranks(2, train, str(tmp_path), "broken", (*overrides, "checkpoint.resume=must"), timeout=LIMIT) == [0, 0]
    expected = losses(tmp_path / "straight")
    assert len(expected) == 6 and losses(tmp_path / "broken") == expected
    straight, broken = weights(tmp_path / "straight"), weights(tmp_path / "broken")
    assert straight.keys() == broken.keys()
    assert all(torch.equal(straight[name], broken[name]) for name in straight)
    assert [path.name for path in sorted((tmp_path / "broken" / "checkpoints").iterdir())] == [
        "latest", "step-00000004", "step-00000006",
    ]  # fmt: skip


def test_a_finished_run_has_everything_and_is_not_trained_again(tmp_path: Path) -> None:

    write(tmp_path)
    assert run_ranks(2, train, str(tmp_path), "run", ("output.tensorboard=true",), timeout=LIMIT) == [0, 0]
    output = tmp_path / "run"
    expected = {
        "config.yaml", "environment.json", "metrics.jsonl", "loss.png", "checkpoints", "summary.json", "model",
        "tokens", "tensorboard", ".lock", "saved.json", "data.json",
    }  # fmt: skip
    assert {path.name for path in output.iterdir()} == expected
    first = losses(output)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    keys = {
        "step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "mfu", "peak_memory_bytes",
        "step_seconds", "data_seconds",
    }  # fmt: skip
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(keys <= record.keys() for record in records)
    assert all(record["tokens_per_second"] == record["tokens"] / record["step_seconds"] for record in records)
    assert [record["step"] for record in records if "eval_loss" in record] == [3, 6]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["last_held_out_loss"] < summary["first_held_out_loss"]
    assert summary["sample"]["prompt"]
    assert summary["data"]["formats"] == {"text": 12} and summary["data"]["skipped"] == []
    assert run_ranks(2, train, str(tmp_path), "run", (), timeout=LIMIT) == [0, 0]
    assert losses(output) == first


def test_the_exported_folder_is_the_trained_model(tmp_path: Path) -> None:
    """Plain transformers, on whole rows and without longctx, gets the held-out loss that the run measured."""

    from transformers import AutoModelForCausalLM

    from longctx.data.loader import EvaluationLoader

    write(tmp_path)
    assert run_ranks(2, train, str(tmp_path), "run", ("zero.stage=3", "train.eval_batches=1000"), timeout=LIMIT) == [
        0,
        0,
    ]
    output = tmp_path / "run"
    model = AutoModelForCausalLM.from_pretrained(output / "model", attn_implementation="sdpa")
    total, count = 0.0, 0
    for window in EvaluationLoader(output / "tokens" / "held_out.tokens", 96, packing="best_fit"):
        (batch,) = window
        for document in range(int(batch["document_ids"].max()) + 1):
            here = batch["document_ids"][0] == document
            labels = batch["shift_labels"][0, here]
            with torch.no_grad():
                logits = model(batch["input_ids"][:, here]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    measured = json.loads((output / "summary.json").read_text())["last_held_out_loss"]
    assert abs(total / count - measured) <= 1e-5 * measured


@pytest.mark.slow
def test_a_run_with_a_copy_of_the_weights_is_the_run_without_and_resumes(tmp_path: Path) -> None:
    """To the last bit: without the copy, with it, and stopped and resumed with it."""
    grid = ("mesh.ring=2", "mesh.data=2", "zero.stage=3")
    copied = (*grid, "zero.group=2")
    for name in ("plain", "straight", "broken"):
        write(tmp_path, name)
    assert run_ranks(4, train, str(tmp_path), "plain", grid, timeout=LIMIT) == [0] * 4
    assert run_ranks(4, train, str(tmp_path), "straight", copied, timeout=LIMIT) == [0] * 4
    assert run_ranks(4, train, str(tmp_path), "broken", copied, 3, timeout=LIMIT) == [75] * 4
    again = (*copied, "checkpoint.resume=must")
    assert run_ranks(4, train, str(tmp_path), "broken", again, timeout=LIMIT) == [0] * 4
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight") == losses(tmp_path / "plain")
    plain, broken = weights(tmp_path / "plain"), weights(tmp_path / "broken")
    assert all(torch.equal(plain[name], broken[name]) for name in plain)

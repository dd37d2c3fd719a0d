"""Random states, schedule, metrics, plot, progress line, folder lock, FLOPs."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from longctx.config.sections.train import TrainSection
from longctx.errors import CheckpointError, DataError
from longctx.train.checkpoint import rng
from longctx.train.lock import FolderLock
from longctx.train.optimizer import SCHEDULES, learning_rate, make_optimizer, set_learning_rate
from longctx.train.report import flops
from longctx.train.report.metrics import Metrics, read
from longctx.train.report.plot import plot_loss
from longctx.train.report.progress import ProgressDisplay, duration


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(numpy.random.rand()),
        float(torch.rand(1)),
        float(torch.randn(1)),
    ]


def test_random_states_come_back_from_json(tmp_path: Path) -> None:
    random.gauss(0, 1), numpy.random.randn()  # both keep a second number for later
    rng.save(tmp_path, 3)
    first = draw()
    rng.load(tmp_path, 3)
    assert draw() == first
    (tmp_path / rng.name_of(3)).write_text(json.dumps({**rng.capture(), "torch": "00"}))
    with pytest.raises(CheckpointError, match="random state"):
        rng.load(tmp_path, 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule: str) -> None:
    def rate(step: int) -> float:
        return learning_rate(step, peak=2.0, warmup=10, total=110, schedule=schedule, final_ratio=0.1)

    assert [rate(step) for step in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(110) == rate(500) == pytest.approx(2.0 if schedule == "constant" else 0.2)
    assert rate(60) == pytest.approx({"constant": 2.0, "linear": 1.1, "cosine": 1.1}[schedule])
    rates = [rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_schedule_without_warmup_starts_near_the_peak() -> None:
    assert learning_rate(1, peak=1.0, warmup=0, total=100, schedule="cosine") > 0.99


def test_optimizer_decays_matrices_only() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    model[0].weight.requires_grad_(True)
    optimizer = make_optimizer(model, TrainSection(steps=1, weight_decay=0.2))
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.2), (3, 0.0)]
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert isinstance(make_optimizer(model, TrainSection(steps=1, optimizer="sgd", momentum=0.9)), torch.optim.SGD)


def test_metrics_drop_what_will_be_done_again(tmp_path: Path) -> None:
    writer = Metrics(tmp_path)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": float(step), "grad_norm": math.inf})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a crash in the middle of a line
    again = Metrics(tmp_path, resume_step=2, tensorboard=True)
    again.write({"step": 3, "loss": 9.0})
    again.close()
    assert [(r["step"], r["loss"]) for r in read(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert read(tmp_path)[0]["grad_norm"] is None
    assert list((tmp_path / "tensorboard").iterdir())


def test_metrics_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, content: bytes) -> int:
            if room:
                return real.write(content[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            real.close()

    said: list[str] = []
    metrics, room = Metrics(tmp_path, say=said.append), False
    real = metrics._file
    monkeypatch.setattr(metrics, "_file", Full())
    for step in (1, 2):
        metrics.write({"step": step, "loss": 2.0})
    assert read(tmp_path) == [] and len(said) == 1 and "No space left" in said[0]
    room = True
    metrics.write({"step": 3, "loss": 2.0})
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3]
    room = False
    metrics.write({"step": 4, "loss": 2.0})
    metrics.close()
    assert len(said) == 3 and "1 steps could not be written" in said[2]


def test_damaged_metrics_are_kept_aside_and_do_not_stop_a_run(tmp_path: Path) -> None:
    lines = [b'{"step": 1, "loss": 1.0}', b"\xff\xfe", b"[1]", b'{"step": "x"}', b'{"step": 2, "loss": 2.0}', b'{"st']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    said: list[str] = []
    Metrics(tmp_path, resume_step=1, say=said.append).close()
    assert [record["step"] for record in read(tmp_path)] == [1]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\n".join(lines)
    assert "metrics.jsonl: 3 damaged lines" in said[0] and "1 steps after step 1 are dropped" in said[1]
    said.clear()
    Metrics(tmp_path, resume_step=1, say=said.append).close()
    assert not said


def test_plot_is_a_png_without_a_display(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no step"):
        plot_loss(tmp_path)
    writer = Metrics(tmp_path)
    for step in range(1, 20):
        writer.write({"step": step, "loss": 9 / step} | ({"eval_loss": 10 / step} if step % 5 == 0 else {}))
    writer.close()
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")


RECORD = {
    "step": 4,
    "loss": 1.5,
    "tokens_per_second": 12345.6,
    "peak_memory_bytes": 2**30,
    "grad_norm": 0.5,
    "mfu": 0.4,
}


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    progress = ProgressDisplay(stream, total=8, every=2)
    for step in (3, 4):
        progress.step(RECORD | {"step": step})
    progress.close()
    assert stream.getvalue().startswith("step 4/8  loss 1.5000  norm 0.50  12,346 tokens/s  MFU 40.0%  1.00 GiB  ")
    assert stream.getvalue().count("\n") == 1 and "left" in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressDisplay(None, total=8)
    progress.say("x")
    progress.step(RECORD)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_durations() -> None:
    assert [duration(x) for x in (4.4, 185, 7800)] == ["4 s", "3 min 05 s", "2 h 10 min"]


def test_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    hold = (
        "import sys, pathlib; from longctx.train.lock import FolderLock\n"
        "with FolderLock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on "), FolderLock(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with FolderLock(tmp_path):
        pass


def description(**changes: object) -> SimpleNamespace:
    sizes = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    values = sizes | {"tie_word_embeddings": True} | changes
    return SimpleNamespace(**values, to_dict=lambda: values)


def test_pairs_count_what_causal_attention_sees() -> None:
    batch = {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]]),
        "document_ids": torch.tensor([[0, 0, 0, 1, 1, -1]]),
    }
    assert flops.FlopsModel(description(), 0).pairs(batch) == 6 + 3
    assert flops.FlopsModel(description(sliding_window=2), 0).pairs(batch) == 5 + 3
    mixed = description(
        sliding_window=2, num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    )
    assert flops.FlopsModel(mixed, 0).pairs(batch) == 2 * 8 + 9
    off = description(sliding_window=2, use_sliding_window=False)
    assert flops.FlopsModel(off, 0).pairs(batch) == 9


def test_flops_agree_with_torchs_counter() -> None:
    """Against torch's counter on plain attention without a mask, which computes the full square of pairs."""
    from torch.utils.flop_counter import FlopCounterMode

    length, config = 16, description()
    attention = torch.nn.MultiheadAttention(
        config.hidden_size, config.num_attention_heads, bias=False, batch_first=True
    )
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    x = torch.randn(1, length, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out, _ = attention(x, x, x, need_weights=True)
        head(out).sum().backward()
    weights = sum(p.numel() for p in attention.parameters()) + head.weight.numel()
    assert flops.FlopsModel(config, weights).step(length, length * length) == counter.get_total_flops()


def test_peak_is_unknown_on_a_cpu() -> None:
    assert flops.peak_flops(torch.device("cpu"), "bf16") is None

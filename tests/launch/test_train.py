"""The same job by longctx's launcher, by torchrun and by deepspeed; and mistakes that end it with one clear error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_run import losses, write

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900  # generous: a start imports torch, deepspeed and transformers in every process


def environment(**changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    beside = str(Path(sys.executable).parent)
    path = f"{beside}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"DS_ACCELERATOR": "cpu", "PATH": path, "PYTHONPATH": str(ROOT)} | changes


def command(launcher: str, config: Path) -> list[str]:
    script = [str(ROOT / "launch" / "train.py"), "--config", str(config)]
    return {
        "longctx": [sys.executable, "-m", "longctx.cli", "train", str(config)],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script],
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "29613", *script],
    }[launcher]


def start(launcher: str, config: Path, overrides: Sequence[str] = (), **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command(launcher, config), *overrides],
        env=environment(**changes),
        cwd=config.parent,  # not the checkout: nothing may depend on where a job is started
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return (exit code, output); a job that does not end is killed with all its ranks, and fails the test."""
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        config = next(argument for argument in process.args if str(argument).endswith(".yaml"))  # type: ignore[union-attr]
        for pid in [process.pid, *ranks_of(Path(str(config)))]:
            os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"did not end within {SECONDS} s:\n{output}") from None
    return process.returncode, output


def ranks_of(config: Path) -> list[int]:
    """Processes that have this test's YAML among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(config).encode() in arguments:
            found.append(int(path.parent.name))
    return found


def wait_for_steps(config: Path, steps: int) -> None:
    metrics = config.with_suffix("") / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while not metrics.is_file() or metrics.read_text().count("\n") < steps:
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.1)


@pytest.mark.deep
@pytest.mark.parametrize("other", ["torchrun", "deepspeed"])
def test_every_launcher_runs_the_same_job(tmp_path: Path, other: str) -> None:
    for launcher in ("longctx", other):
        config = write(tmp_path, launcher)
        extra = {"LOCAL_SIZE": "2"} if launcher == "deepspeed" else {}
        code, output = finish(start(launcher, config, ["zero.stage=2"], **extra))
        assert code == 0, output
        assert output.count("step 6/6") == 1 and "held-out loss" in output
        summary = json.loads((tmp_path / launcher / "summary.json").read_text())
        assert summary["status"] == "completed" and summary["world"]["ring"] == 2
    expected = losses(tmp_path / "longctx")
    assert len(expected) == 6
    assert losses(tmp_path / other) == expected
    assert not ranks_of(tmp_path / f"{other}.yaml")


@pytest.mark.deep
def test_stop_on_request_then_resume(tmp_path: Path) -> None:
    config = write(tmp_path)
    process = start("longctx", config, ["train.steps=100000", "checkpoint.every=0", "train.eval_every=0"])
    wait_for_steps(config, 3)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75 and "start again to resume" in output
    step = json.loads((tmp_path / "run" / "summary.json").read_text())["step"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == [f"step-{step:08d}"]
    # a killed rank, in the resumed run: named, and nothing is left
    process = start("longctx", config, ["train.steps=100000", "train.eval_every=0", "checkpoint.resume=must"])
    wait_for_steps(config, step + 3)
    victims = [pid for pid in ranks_of(config) if pid != process.pid]
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    code, output = finish(process)
    assert code == 1 and "was killed by SIGKILL" in output and f"resumed at step {step}" in output
    assert not ranks_of(config)


@pytest.mark.deep
def test_a_frozen_rank_is_named_and_the_job_ends(tmp_path: Path) -> None:
    config = write(tmp_path)
    more = ["train.steps=100000", "checkpoint.every=0", "train.eval_every=0", "launch.frozen_seconds=6"]
    process = start("longctx", config, more)
    wait_for_steps(config, 2)
    stopped = time.monotonic()
    victim = max(pid for pid in ranks_of(config) if pid != process.pid)
    os.kill(victim, signal.SIGSTOP)
    code, output = finish(process)
    assert code == 1 and "made no sign of life for" in output and "Traceback" not in output, output
    assert time.monotonic() - stopped < 120 and not ranks_of(config)


@pytest.mark.deep
def test_a_rank_with_another_setting_under_torchrun_is_named(tmp_path: Path) -> None:
    """Each rank reads the YAML by itself there; here the second one finds another learning rate in it."""
    config = write(tmp_path)
    script = tmp_path / "differing.py"
    script.write_text(
        "import os, sys\nfrom longctx.launch.rank import main\nfrom longctx.launch.rank_process import end\n"
        "more = ['train.lr=0.5'] if os.environ['RANK'] == '1' else []\n"
        f"if __name__ == '__main__':\n    end(main(['--config', {str(config)!r}, *more]))\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(launcher, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode != 0 and "train.lr: 0.01 on rank 0, 0.5 on rank 1" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_mistakes_are_one_error_each(tmp_path: Path) -> None:
    """Found by the launcher before any rank starts: seconds, no traceback, no process."""
    config = write(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "file").write_text("")
    mistakes = {
        "train.stepps=3": "steps",
        "mesh.world=3": "world",
        "mesh.ring=64": "needs rows of at least 128 tokens",
        "data.sources=nowhere.txt": "nowhere.txt",
        "data.sources=empty.txt": "empty",
        "output.folder=file": "file",
        "checkpoint.resume=must": "no checkpoint",
    }
    for override, named in mistakes.items():
        started = time.monotonic()
        code, output = finish(start("longctx", config, [override]))
        assert code not in (0, 75) and named in output and "Traceback" not in output, f"{override}: {output}"
        assert output.count("\n") <= 6 and time.monotonic() - started < 60
    assert not ranks_of(config)


def test_a_mistake_that_only_ranks_find(tmp_path: Path) -> None:
    """All ranks end, the message comes once and without a traceback, and no process is left."""
    from longctx.data.build import build_tokens

    config = write(tmp_path)
    tokens = tmp_path / "tokens"
    build_tokens(str(tmp_path / "text"), "bytes", tokens, held_out=0.2)
    whole = (tokens / "train.tokens").read_bytes()
    (tokens / "train.tokens").write_bytes(whole[: len(whole) // 2])
    code, output = finish(start("longctx", config, [f"data.sources={tokens}"]))
    assert code == 1 and "train.tokens" in output and "Traceback" not in output, output
    assert len(output.splitlines()) == 1
    assert not ranks_of(config)

"""Jobs on real hosts, for the tests of `make test-multinode`: start one, let it train, see that nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from launch_samples import CANARIES
from namespaces import Hosts

ROOT = Path(__file__).resolve().parents[1]
GONE_SECONDS = 60
YAML = """
data: {sources: TEXT, tokenizer: bytes, sequence_length: 512, held_out: 0.1, packing: best_fit}
mesh: {ring: 2, data: 2}
train: {steps: 5, lr: 0.003, warmup_steps: 2, eval_every: 0, eval_batches: 2}
zero: {stage: 3}
checkpoint: {every: 2}
output: {folder: RUN, sample_prompt: 8, sample_tokens: 4}
"""


def write(folder: Path, name: str, launch: str = "") -> Path:
    """Write a YAML that trains the quickstart's model with ring 2 x data 2 and ZeRO-3 into ``folder/name``.

    ``launch`` is what the `launch` section says, without braces.
    """
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for number in range(24):
        lines = (f"{number} times {factor} is {number * factor}\n" for factor in range(40 + 9 * (number % 5)))
        (text / f"{number:02d}.txt").write_text("".join(lines) + "and so on\n")
    quickstart = (ROOT / "configs" / "quickstart.yaml").read_text()
    model = quickstart[quickstart.index("model:") : quickstart.index("data:")]
    path = folder / f"{name}.yaml"
    described = YAML.replace("TEXT", str(text)).replace("RUN", str(folder / name))
    path.write_text(model + described + (f"launch: {{{launch}}}\n" if launch else ""))
    return path


def start(path: Path, *arguments: str, command: str = "train", **more: str) -> subprocess.Popen[str]:
    """Start `longctx train PATH`, with 40 secrets in the environment; ``more`` are further variables."""
    argv = [sys.executable, "-m", "longctx.cli", command, str(path), *arguments]
    return begin(argv, path.parent, **more)


def begin(argv: list[str], folder: Path, **more: str) -> subprocess.Popen[str]:
    """Start any command in ``folder``."""
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": found, "DS_ACCELERATOR": "cpu"} | CANARIES | more
    return subprocess.Popen(
        argv, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str]:
    """Return (exit code, output)."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, output


def wait_for_steps(process: subprocess.Popen[str], output: Path, steps: int = 2) -> None:
    """Wait until the run has written ``steps`` lines of metrics; fail if it ends before."""
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.is_file() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None and time.monotonic() < deadline, finish(process, 5)[1]
        time.sleep(0.1)


def training(path: Path, **more: str) -> subprocess.Popen[str]:
    """Start an endless run in a new folder and wait for its second step."""
    assert not path.with_suffix("").exists()
    process = start(path, "train.steps=100000", "checkpoint.every=50", "checkpoint.keep=1", **more)
    wait_for_steps(process, path.with_suffix(""))
    return process


def ranks(hosts: Hosts, index: int) -> list[int]:
    """Return the processes of a host that train."""
    return [pid for pid in hosts.processes(index) if b"longctx.launch.rank" in cmdline(pid)]


def wait_until_empty(hosts: Hosts, since: float) -> float:
    """Wait until no host has a process of ours, and return how long that took since ``since``."""
    while left := [pid for index in range(hosts.count) for pid in hosts.processes(index)]:
        assert time.monotonic() - since < GONE_SECONDS, [(pid, cmdline(pid)) for pid in left]
        time.sleep(0.2)
    return time.monotonic() - since


def written_by(output: Path) -> str:
    """Return everything that a run wrote as text, to look for what must not be there."""
    return "".join(path.read_bytes().decode("latin-1") for path in output.rglob("*") if path.is_file())


def command_lines() -> str:
    """Return the command lines of all processes of this machine, its hosts' too."""
    return " ".join(cmdline(int(path.name)).decode("latin-1") for path in Path("/proc").glob("[0-9]*"))


def cmdline(pid: int) -> bytes:
    """Return the command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""

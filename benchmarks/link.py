"""How much of its communication the ring hides, over links of known bandwidth: ``python -m benchmarks.link``.

Two ranks, each in its own network namespace with one core's worth of threads, joined by a cable whose bandwidth `tc`
limits (tbf). Measured for every length and bandwidth: how long the messages of a pass take alone, how long the pass
takes, and how long its computing thread waited for messages. Hidden is what it did not wait for.

The prediction (docs/methods/ring.md "Overlap"): a block of c tokens travels while the one before it is computed, so all
of it is hidden if c >= c* = e · (kv heads ÷ heads) · F ÷ B, and c ÷ c* of it otherwise (causal, balanced; e bytes per
element, F achieved FLOP/s, B bytes/s). Needs root, Linux and iproute2. Takes about two minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import hardware
from benchmarks.harness import RESULTS as FOLDER
from benchmarks.harness import gathered, read_csv, write_csv
from benchmarks.measure import measure

NAMES, ADDRESSES = ("longctx-link1", "longctx-link2"), ("10.231.78.1", "10.231.78.2")
INTERFACE = "cable"
MEGABITS = (100, 250, 500, 1000, 2000, 4000)
LENGTHS = (512, 1024, 2048)  # tokens per rank
HEADS = KV_HEADS = 8
HEAD_DIM = 64
BYTES = 4  # per element, fp32
TURNS = 3
ROOT = Path(__file__).resolve().parents[1]
RESULTS, PLOT = FOLDER / "link_cpu.csv", ROOT / "docs" / "images" / "link.png"


def main() -> int:
    """Measure, write the rows, and plot them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--plot", action="store_true", help="only plot the rows in the file")
    options = parser.parse_args()
    if options.rank is not None:
        rank(options.rank)
        return 0
    if not options.plot:
        with cable():
            command = [sys.executable, "-m", "benchmarks.link", "--rank"]
            others = [
                subprocess.Popen(["ip", "netns", "exec", name, *command, str(number)], cwd=ROOT)
                for number, name in enumerate(NAMES)
            ]
            codes = [process.wait() for process in others]
        if any(codes):
            return 1
    draw()
    return 0


@contextmanager
def cable() -> Iterator[None]:
    """Two namespaces with one cable between them, removed at the end."""
    try:
        for name in NAMES:
            _ip("netns", "add", name)
        first, second = NAMES
        _ip("-n", first, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def limit(megabits: int) -> None:
    """Limit the bandwidth out of this namespace; the other side does the same."""
    burst = max(megabits * 1_000_000 // 8 // 250, 65_536)
    rate = ["rate", f"{megabits}mbit", "burst", str(burst), "latency", "200ms"]
    subprocess.run(["tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *rate], check=True)


def rank(number: int) -> None:
    """Measure all rows as one of the two ranks; rank 0 writes them."""
    os.environ.update(RANK=str(number), WORLD_SIZE="2", GLOO_SOCKET_IFNAME=INTERFACE, DS_ACCELERATOR="cpu")
    import torch
    import torch.distributed as dist

    import longctx

    torch.set_num_threads(1)
    store = dist.TCPStore(ADDRESSES[0], 29400, 2, is_master=number == 0)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    mesh = longctx.Mesh(ring=2)
    rows = []
    for megabits in MEGABITS:
        limit(megabits)
        for length in LENGTHS:
            rows += row(mesh, megabits, length)
            if number == 0:
                print(*(f"{key}={value}" for key, value in rows[-2].items() if key != "hardware"), flush=True)
    if number == 0:
        write_csv(RESULTS, rows)


def row(mesh: Any, megabits: int, length: int) -> list[dict[str, Any]]:
    """Return the forward and backward row of one length and bandwidth: medians of the slower rank's turns."""
    import torch

    shape = (1, HEADS, length, HEAD_DIM)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    weights = torch.randn(shape)
    block = 2 * length * KV_HEADS * HEAD_DIM * BYTES  # keys and values, and as much for their gradients
    load, turns = hardware.load(), []
    for turn in range(TURNS + 1):
        taken = one_turn(mesh, (q, k, v), weights, block)
        if turn:  # the first warms up
            turns.append(taken)
    message_seconds, *passes = (median(values) for values in zip(*turns, strict=True))
    found = []
    for name, messages, work, (wall, waited) in (
        ("forward", 1, 4, passes[:2]),
        ("backward", 3, 10, passes[2:]),
    ):
        computed = wall - waited
        flops = work * length**2 * HEADS * HEAD_DIM / computed  # two blocks per rank, half of each is masked
        alone = messages * message_seconds
        bandwidth = block / message_seconds
        enough = BYTES * KV_HEADS / HEADS * flops / bandwidth if name == "forward" else 0.0
        step = computed / 2
        exposed = sum(max(message_seconds - step, 0.0) for _ in range(messages - (name == "backward")))
        exposed += message_seconds if name == "backward" else 0.0  # a gradient's last hop home overlaps with no block
        found.append({
            "pass": name, "megabits": megabits, "local_tokens": length, "message_seconds": f"{message_seconds:.5f}",
            "messages_alone_seconds": f"{alone:.5f}", "wall_seconds": f"{wall:.5f}", "waited_seconds": f"{waited:.5f}",
            "gigaflops": f"{flops / 1e9:.1f}", "tokens_needed": f"{enough:.0f}" if enough else "",
            "hidden": f"{max(1 - waited / alone, 0.0):.3f}", "predicted": f"{1 - exposed / alone:.3f}",
            "load_at_start": f"{load:.2f}", "commit": hardware.commit(), "hardware": hardware.describe(),
        })  # fmt: skip
    return found


def one_turn(mesh: Any, inputs: tuple[Any, ...], weights: Any, block: int) -> tuple[float, ...]:
    """Return seconds: of one message alone; wall and waited of a forward pass; wall and waited of a backward pass."""
    import torch

    import longctx

    held: list[Any] = []
    message = _slowest(measure(lambda: _exchange(block)))
    torch.distributed.barrier()
    forward = measure(lambda: held.append(longctx.ring_attention(*inputs, mesh=mesh, causal=True, layout="zigzag")))
    seconds = (message[0], *_slowest(forward))
    torch.distributed.barrier()
    return (*seconds, *_slowest(measure(lambda: held[0].backward(weights))))


def _exchange(size: int) -> None:
    """Send one block to the other rank while receiving one from it, and compute nothing."""
    import torch
    import torch.distributed as dist

    other = 1 - dist.get_rank()
    sent, received = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    for work in (dist.irecv(received, other), dist.isend(sent, other)):
        work.wait()


def _slowest(sample: Any) -> tuple[float, float]:
    """Return (wall, waited) of the rank that took longer."""
    wall, waited = max(gathered(sample.wall, sample.blocked))
    return wall, waited


def draw() -> None:
    """Plot the hidden share against c ÷ c*, and the prediction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_csv(RESULTS)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    forward = [one for one in rows if one["pass"] == "forward"]
    ratios = [float(one["local_tokens"]) / float(one["tokens_needed"]) for one in forward]
    grid = [10 ** (exponent / 50) for exponent in range(-75, 76)]
    left.plot(grid, [min(1.0, x) for x in grid], color="0.5", label="predicted: min(1, c ÷ c*)")
    for length in LENGTHS:
        points = [(x, float(one["hidden"])) for x, one in zip(ratios, forward, strict=True)
                  if int(one["local_tokens"]) == length]  # fmt: skip
        left.plot(*zip(*points, strict=True), "o", label=f"measured, c = {length:,}")
    left.set(xscale="log", xlabel="c ÷ c*,  c* = e · (kv heads ÷ heads) · F ÷ B")
    left.set_ylabel("share of communication hidden")
    left.set_title("forward")
    backward = [one for one in rows if one["pass"] == "backward"]
    right.plot([0, 1], [0, 1], color="0.5", label="measured = predicted")
    for length in LENGTHS:
        points = [(float(one["predicted"]), float(one["hidden"])) for one in backward
                  if int(one["local_tokens"]) == length]  # fmt: skip
        right.plot(*zip(*points, strict=True), "o", label=f"c = {length:,}")
    right.set(xlabel="predicted by the schedule (1 of 3 messages overlaps with no block)")
    right.set_title("backward")
    for axes in (left, right):
        axes.set_ylim(-0.03, 1.05)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    sys.exit(main())

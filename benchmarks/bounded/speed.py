"""Time and memory of one attention layer against length: bounded state beside softmax.

    python -m benchmarks.bounded.speed [--lengths 256 512 … 262144] [--sdpa-up-to 65536] [--turns 3] [--quick]

Every contestant is checked against its definition in fp64 before it is timed. CPU time is that of the process, on one
thread unless ``--threads`` says otherwise, so that it counts work and not waiting threads. Contestants take turns.
Softmax beyond ``--sdpa-up-to`` is reported as not measured; beyond 16K, where it judges nothing, it is called once.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import hardware
from benchmarks.bounded.contestants import CONTESTANTS, USES, Shape, inputs, state_bytes, truth
from benchmarks.harness import MIB, NOT_MEASURED, RESULTS, Verdict, at_least, judge, spread, turns, write_csv
from benchmarks.measure import measure, peak_bytes, relative_error

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
SOFTMAX = "softmax (SDPA)"
JUDGED = 16_384
FROM, EXPONENT = 4096, 0.05  # tokens from which the exponent of time in length is fitted; its tolerance
AIMS = {"ABC, 64 slots": (8.0, 4.0), "Cottention": (15.0, 6.0)}  # times SDPA at 16K: forward, forward + backward
LARGEST_ERROR = 1e-5
TOKENS = 4096
"""Per sample at least: short sequences are called several times."""


def check(shape: Shape) -> dict[str, float]:
    """Return every contestant's relative error at a short length."""
    given = inputs(shape)
    return {name: relative_error(call(**given), truth(name, given)) for name, call in CONTESTANTS.items()}


def run_row(shape: Shape, count: int, sdpa_up_to: int) -> list[dict[str, Any]]:
    """Time forward, and forward with backward, of everyone in turns; return one row per contestant."""
    given = inputs(shape)
    names = [name for name in CONTESTANTS if name != SOFTMAX or shape.tokens <= sdpa_up_to]
    tensors = {name: {key: given[key].clone().requires_grad_() for key in USES[name]} for name in names}

    def forward(name: str) -> Any:
        with torch.no_grad():
            return CONTESTANTS[name](**tensors[name])

    def both(name: str) -> None:
        out = CONTESTANTS[name](**tensors[name])
        torch.autograd.grad(out, list(tensors[name].values()), given["grad"])

    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name in names}
    calls = max(1, TOKENS // shape.tokens)
    for turn, order in turns(names, count + 1):  # the first warms up
        for name in order:
            once = name == SOFTMAX and shape.tokens > JUDGED
            if once and turn != 1:
                continue
            for kind, call in (("forward", forward), ("both", both)):
                sample = measure(lambda call=call, name=name: [call(name) for _ in range(calls)])  # type: ignore[misc]
                if turn:
                    times[name][kind].append(sample.cpu / calls)
    return [_row(shape, name, times.get(name), (lambda name=name: both(name))) for name in CONTESTANTS]  # type: ignore[misc]


def _row(shape: Shape, name: str, times: dict[str, list[float]] | None, both: Any) -> dict[str, Any]:
    row = {
        "tokens": shape.tokens, "contestant": name, "heads": shape.heads, "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "dtype": "float32", "threads": torch.get_num_threads(),
        "state_bytes": state_bytes(name, shape), "hardware": hardware.describe(), "load": f"{hardware.load():.1f}",
        "commit": hardware.commit(),
    }  # fmt: skip
    if times is None:
        return {**row, "forward_cpu_seconds": NOT_MEASURED, "both_cpu_seconds": NOT_MEASURED, "peak_bytes": ""}
    forward, whole = median(times["forward"]), median(times["both"])
    return {
        **row, "forward_cpu_seconds": f"{forward:.6f}", "both_cpu_seconds": f"{whole:.6f}",
        "tokens_per_cpu_second": f"{shape.tokens / whole:.0f}", "peak_bytes": peak_bytes(both),
        "both_spread": f"{spread(times['both']):.3f}",
    }  # fmt: skip


def exponent(points: list[tuple[int, float]]) -> float:
    """Return the slope of log time over log length, by least squares."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return across / sum((x - mean_x) ** 2 for x in xs)


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Return the verdicts on all rows; a row that was not measured judges nothing."""
    seconds = {
        (row["contestant"], int(row["tokens"]), kind): float(row[f"{kind}_cpu_seconds"])
        for row in rows
        for kind in ("forward", "both")
        if row["forward_cpu_seconds"] != NOT_MEASURED
    }
    said = []
    for name, aims in AIMS.items():
        for kind, aim in zip(("forward", "both"), aims, strict=True):
            points = sorted((tokens, t) for (who, tokens, what), t in seconds.items() if (who, what) == (name, kind))
            far = [point for point in points if point[0] >= FROM]
            if len(far) > 2:
                slope = exponent(far)
                text = f"{name}, {kind}: time grows as length^{slope:.3f}, required 1 ± {EXPONENT}"
                said.append((text, abs(slope - 1) <= EXPONENT))
            if (SOFTMAX, JUDGED, kind) in seconds and (name, JUDGED, kind) in seconds:
                speed = seconds[SOFTMAX, JUDGED, kind] / seconds[name, JUDGED, kind]
                said.append(at_least(f"{name}, {kind} at {JUDGED}: x SDPA's speed", speed, aim, digits=2))
            faster = [t for t, own in points if seconds.get((SOFTMAX, t, kind), 0.0) >= own]
            if any(t <= 512 for t, _ in points):
                text = f"{name}, {kind}: faster than SDPA from {min(faster, default=0)} tokens on, required <= 512"
                said.append((text, bool(faster) and min(faster) <= 512))
        sizes = {int(row["state_bytes"]) for row in rows if row["contestant"] == name}
        said.append((f"{name}: state of {sorted(sizes)} bytes, required one size", len(sizes) == 1))
    return said


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the speed of training, its peak memory, and the bytes cached for generation, over the length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("tokens_per_cpu_second", 1, "forward + backward, tokens per CPU second"),
        ("peak_bytes", MIB, "forward + backward, peak memory, MiB"),
        ("state_bytes", MIB, "cached for the next token, MiB per layer and sequence"),
    )
    for axes, (field, unit, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in CONTESTANTS:
            known = [row for row in rows if row["contestant"] == name and row.get(field, "") != ""]
            values = [float(row[field]) / unit for row in known]
            axes.plot([int(row["tokens"]) for row in known], values, "o-", label=name, markersize=4)
        axes.set_ylabel(label)
        axes.set_xlabel("tokens")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, write results/bounded_cpu.csv and bounded_cpu.png, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--sdpa-up-to", type=int, default=65_536)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="short lengths, one turn; nothing is judged")
    arguments = parser.parse_args()
    lengths, turns = ((256, 512, 1024), 1) if arguments.quick else (arguments.lengths, arguments.turns)
    torch.set_num_threads(arguments.threads)
    errors = check(Shape(192))
    print("relative errors against the definitions in fp64:", {name: f"{e:.1e}" for name, e in errors.items()})
    if not all(error <= LARGEST_ERROR for error in errors.values()):
        return 1
    rows: list[dict[str, Any]] = []
    for tokens in lengths:
        rows += run_row(Shape(tokens), turns, arguments.sdpa_up_to)
        for row in rows[-len(CONTESTANTS) :]:
            print(
                f"{row['tokens']:>8} {row['contestant']:<16} forward {row['forward_cpu_seconds']:>12} s  both "
                f"{row['both_cpu_seconds']:>12} s  peak {row['peak_bytes']:>14}",
                flush=True,
            )
        _write(rows, arguments.output)
    return int(not judge([] if arguments.quick else verdicts(rows)))


def _write(rows: list[dict[str, Any]], folder: Path) -> None:
    write_csv(folder / "bounded_cpu.csv", rows)
    plot(rows, folder / "bounded_cpu.png")


if __name__ == "__main__":
    raise SystemExit(main())

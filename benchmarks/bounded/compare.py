"""Train the same small model with every kind of layer, from one YAML, with equal budgets and seeds; then compare.

    python -m benchmarks.bounded.compare [--seeds 0 1 2] [--hours 4] [--only softmax cottention] [train.steps=…]

Each run is `longctx train` over a ring of two. Complete runs are not repeated, a stopped run resumes from its last
checkpoint, and when the hours are over the next call continues. All variants of a seed see the same rows in the same
order and are evaluated on the same held-out documents, so differences are taken seed by seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import hardware
from benchmarks.bounded.curves import losses_by_position
from benchmarks.bounded.summary import report
from benchmarks.bounded.variants import VARIANTS
from longctx.config.write import scalar

BASE = Path(__file__).with_name("compare.yaml")
TEMPORARY = 75  # exit code of a run that was stopped after a checkpoint


def train(name: str, seed: int, folder: Path, overrides: list[str], seconds: float) -> bool:
    """Train one variant with one seed, or resume it; return whether it is complete."""
    output = folder / f"{name}-seed{seed}"
    if complete(output):
        return True
    given = [
        f"output.folder={output}", f"data.folder={folder / f'tokens-{seed}'}", f"train.seed={seed}",
        f"data.seed={seed}", f"attention.layers={scalar(VARIANTS[name])}", *overrides,
    ]  # fmt: skip
    print(f"--- {name}, seed {seed}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "longctx.cli", "train", str(BASE), *given])
    try:
        code = process.wait(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        process.terminate()  # the run saves a checkpoint and stops
        code = process.wait(timeout=300)
    if code not in (0, TEMPORARY):
        raise SystemExit(f"{name}, seed {seed}: longctx train ended with {code}")
    return complete(output)


def complete(output: Path) -> bool:
    """Return whether a run has finished."""
    summary = output / "summary.json"
    return summary.is_file() and json.loads(summary.read_text()).get("status") == "completed"


def result_of(name: str, seed: int, folder: Path, rows: int) -> dict[str, Any]:
    """Return a finished run's losses, computed once and stored in its folder."""
    output = folder / f"{name}-seed{seed}"
    kept = output / "comparison.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    summary = json.loads((output / "summary.json").read_text())
    curve = losses_by_position(output / "model", folder / f"tokens-{seed}", summary["sequence_length"], rows)
    result = {
        "variant": name, "seed": seed, "held_out_loss": summary["last_held_out_loss"],
        "held_out_losses": summary["held_out_losses"], "parameters": summary["parameters"],
        "tokens": summary["tokens"], "seconds": summary["seconds_in_loop"], "by_position": curve,
        "hardware": hardware.describe(), "commit": hardware.commit(),
    }  # fmt: skip
    kept.write_text(json.dumps(result))
    return result


def main() -> int:
    """Train what is missing, then write comparison.json, .md and .png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--rows", type=int, default=32, help="held-out rows of the loss-by-position curve")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare-bounded"))
    arguments = parser.parse_args()
    until = time.monotonic() + 3600 * arguments.hours
    folder = arguments.folder.absolute()
    results = []
    for seed in arguments.seeds:
        for name in arguments.only:
            left = until - time.monotonic()
            if (left > 0 or complete(folder / f"{name}-seed{seed}")) and train(
                name, seed, folder, arguments.overrides, left
            ):
                results.append(result_of(name, seed, folder, arguments.rows))
                report(results, folder)
    wanted = len(arguments.seeds) * len(arguments.only)
    print(f"{len(results)} of {wanted} runs are complete; {folder / 'comparison.md'}")
    return 0 if len(results) == wanted else TEMPORARY


if __name__ == "__main__":
    raise SystemExit(main())

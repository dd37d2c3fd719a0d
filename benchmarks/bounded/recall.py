"""What a bounded state can hold: copying a random text, and finding a key in filler, beside softmax.

    python -m benchmarks.bounded.recall [--steps 1500] [--seeds 0 1 2] [--only softmax cottention] [--tasks passkey]

Copying n random tokens needs n tokens of memory: M slots or a D × D matrix hold them only up to some length. A key in
filler needs one thing to be kept and the rest ignored, which a learned control can do and a window shorter than the
distance cannot. Two-layer models, one process; accuracy is the share of correct tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import hardware
from benchmarks.harness import RESULTS, read_csv, write_csv
from longctx.models.convert import convert
from longctx.models.load.pretrained import make_model
from longctx.models.load.scratch import make_config

SYMBOLS, FILLER, MARK, ASK = 16, 16, 17, 18  # tokens: 0 to 15 carry information
KEY = 4  # tokens of a pass key
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"*": "ring"},
    "abc-mlp-16": {"*": {"abc": {"slots": 16}}},
    "abc-mlp-64": {"*": {"abc": {"slots": 64}}},
    "abc-window-16": {"*": {"abc": {"slots": 16, "control": "window"}}},
    "abc-random-16": {"*": {"abc": {"slots": 16, "control": "random"}}},
    "cottention": {"*": "cosine"},
    "hybrid-16": {"0": {"abc": {"slots": 16}}, "1": "ring"},
}
TASKS = {"copy": (8, 16, 32, 64), "passkey": (64, 128, 256)}


def draw(task: str, length: int, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Return rows (B, S), and the number of their last tokens that the model must predict."""
    if task == "copy":
        text = torch.randint(SYMBOLS, (batch, length), generator=generator)
        return torch.cat([text, torch.full((batch, 1), ASK), text], 1), length
    rows = torch.full((batch, length), FILLER)
    key = torch.randint(SYMBOLS, (batch, KEY), generator=generator)
    place = torch.randint(length - KEY - 1, (batch, 1), generator=generator)
    rows.scatter_(1, place, MARK)
    rows.scatter_(1, place + 1 + torch.arange(KEY), key)
    return torch.cat([rows, torch.full((batch, 1), ASK), key], 1), KEY


def make(kind: str, length: int, seed: int) -> Any:
    """Return a two-layer Llama with layers of this kind."""
    sizes = {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128, "vocab_size": 32}
    config = make_config("llama", max_positions=2 * length + 2, **sizes)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    return make_model(convert(config, KINDS[kind]))


def accuracy(kind: str, task: str, length: int, seed: int, steps: int, batch: int = 32) -> float:
    """Train one model on new rows and return the share of correct tokens on rows that it has not seen."""
    model, generator = make(kind, length, seed), torch.Generator().manual_seed(seed)
    rule = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    warm = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: min(1.0, (step + 1) / warm) * (1 - step / steps))
    for _ in range(steps):
        rows, asked = draw(task, length, batch, generator)
        logits = model(rows[:, :-1], use_cache=False).logits[:, -asked:]
        F.cross_entropy(logits.flatten(0, 1), rows[:, -asked:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad()
        schedule.step()
    rows, asked = draw(task, length, 256, torch.Generator().manual_seed(10**6 + seed))
    with torch.no_grad():
        guess = model(rows[:, :-1], use_cache=False).logits[:, -asked:].argmax(-1)
    return float((guess == rows[:, -asked:]).double().mean())


def main() -> None:
    """Train every kind on every task and length; rows that results/recall_cpu.csv already has are skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="instead of each task's own")
    parser.add_argument("--output", type=Path, default=RESULTS / "recall_cpu.csv")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = [*read_csv(arguments.output)] if arguments.output.is_file() else []
    done = {(row["task"], row["length"], row["kind"], row["seed"], row["steps"]) for row in rows}
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for length in arguments.lengths or TASKS[task]:
                for kind in arguments.only:
                    if (task, str(length), kind, str(seed), str(arguments.steps)) in done:
                        continue
                    share = accuracy(kind, task, length, seed, arguments.steps)
                    rows.append({
                        "task": task, "length": length, "kind": kind, "seed": seed, "steps": arguments.steps,
                        "accuracy": f"{share:.4f}", "chance": f"{1 / SYMBOLS:.4f}", "hardware": hardware.describe(),
                        "commit": hardware.commit(),
                    })  # fmt: skip
                    print(f"{task:<8} {length:>4} {kind:<14} seed {seed}: {share:.3f}", flush=True)
                    write_csv(arguments.output, rows)


if __name__ == "__main__":
    main()

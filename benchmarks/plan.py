"""The planner's memory against real training steps on CPU ranks, to the byte: `python -m benchmarks.plan`.

The profiler records everything that a rank allocates, from before the model exists; what is compared is the peak during
its second optimizer step, weights and optimizer states included. DeepSpeed's buckets are made small, or the smallest
models would be mostly buckets.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.hardware import commit, describe
from benchmarks.harness import RESULTS, largest, write_csv

LIMIT = 0.10  # of the measured peak

_BASE: dict[str, dict[str, Any]] = {
    "model": {"architecture": "llama", "hidden_size": 256, "layers": 4, "heads": 8, "kv_heads": 2, "vocab_size": 4096},
    "mesh": {"ring": 2, "data": 1},
    "data": {"sources": "python-stdlib", "tokenizer": "bytes", "sequence_length": 4096},
    "train": {"steps": 10},
    "memory": {},
    "zero": {"stage": 3},
    "output": {"folder": "runs/plan"},
    "deepspeed": {"zero_optimization": "{reduce_bucket_size: 500_000}"},
}
_KEEP = {"memory.recompute": "layer_keep_attention"}
_LONG = _KEEP | {  # its peak is at attention's backward
    "memory.mlp_tile": "auto", "memory.recompute_norms": "true", "memory.loss_tile": 128, "model.dtype": "bf16",
    "data.sequence_length": 16384,
}  # fmt: skip
_SMALL = {"model.hidden_size": 128, "model.layers": 2, "model.heads": 4, "data.sequence_length": 2048}

CASES: dict[str, dict[str, Any]] = {
    "one rank, logits untiled": {"mesh.ring": 1, "zero.stage": 0, "memory.loss_tile": "none"},
    "one rank, ZeRO-1, bf16, MLPs recomputed": {
        "mesh.ring": 1, "zero.stage": 1, "memory.recompute": "mlp", "model.dtype": "bf16",
    },
    "ring, ZeRO-3, all kept": {},
    "ring, ZeRO-2, layers recomputed": {"zero.stage": 2, "memory.recompute": "layer"},
    "ring, ZeRO-3, attention kept, tiles": _KEEP | {"memory.mlp_tile": "auto", "data.sequence_length": 16384},
    "ring, ZeRO-3, bf16, attention kept, tiles": _KEEP | {"memory.mlp_tile": "auto", "model.dtype": "bf16"},
    "ring, ZeRO-3, bf16, attention kept, tiles, norms": _KEEP | {
        "memory.mlp_tile": "auto", "memory.recompute_norms": "true", "model.dtype": "bf16",
    },
    "16K tokens, bf16, small tiles, norms": _LONG,
    "16K tokens, bf16, small tiles": _LONG | {"memory.recompute_norms": "false"},
    "16K tokens, bf16, small tiles, norms, checkpoints offloaded": _LONG | {"memory.offload_checkpoints": "true"},
    "ring, ZeRO-3, bf16, MLPs and norms recomputed": {
        "memory.recompute": "mlp", "memory.recompute_norms": "true", "model.dtype": "bf16",
    },
    "ring, ZeRO-2, optimizer offloaded": _KEEP | {"zero.stage": 2, "zero.offload_optimizer": "cpu"},
    "ring, no ZeRO, two rows, multi-head, tied": _KEEP | {
        "zero.stage": 0, "train.micro_batch": 2, "model.kv_heads": 8, "model.tie_embeddings": "true",
    },
    "small, ring, ZeRO-3, attention kept": _SMALL | _KEEP,
    "small, ring, ZeRO-2": _SMALL | {"zero.stage": 2},
}  # fmt: skip
"""name -> changes of the base; the two small ones are for the default tests"""
SMALL = tuple(name for name in CASES if name.startswith("small"))


def text_of(changes: dict[str, Any]) -> str:
    """Return a case's YAML."""
    tree = {section: dict(block) for section, block in _BASE.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return "\n".join(
        f"{section}:\n" + "\n".join(f"  {name}: {value}" for name, value in block.items())
        for section, block in tree.items()
        if block
    )


def ranks_of(case: str) -> int:
    """Return the number of ranks of a case."""
    return int(CASES[case].get("mesh.ring", 2))


def predicted(case: str) -> tuple[int, str]:
    """Return the planner's peak of a case in bytes, and the moment of the step where it is."""
    from longctx.config.derived import derive
    from longctx.config.load import loads
    from longctx.plan.memory import step_bytes
    from longctx.plan.setup import setup_of
    from longctx.plan.shape import shape_of

    ranks = ranks_of(case)
    config = loads(text_of(CASES[case]), name=case, default_world=ranks).config
    shape = shape_of(config)
    setup = setup_of(config, derive(config, ranks), shape, on_gpu=False)
    setup = replace(setup, offload_checkpoints=config.memory.offload_checkpoints)
    peak = step_bytes(shape, setup).peak
    return peak.total, peak.name


def measured(case: str, ranks: int) -> int:
    """Return the most bytes that any rank held during its second training step. Every rank calls this."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.measure import allocations, frees_seen

    gc.collect()
    with frees_seen(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        engine, step = _engine(case, ranks)
        step()
        gc.collect()
        torch.empty(_MARK, dtype=torch.uint8)
        step()
        torch.empty(_MARK, dtype=torch.uint8)
    held = marks = peak = 0
    for nbytes in allocations(recorded):
        held += nbytes
        marks += nbytes == _MARK
        peak = max(peak, held) if marks == 1 and abs(nbytes) != _MARK else peak
    assert marks == 2
    engine.destroy()
    return largest(peak)


_MARK = 1_234_567  # bytes of an allocation that nothing else makes: it marks the start and end of the second step


def _engine(case: str, ranks: int) -> tuple[Any, Any]:
    """Return the run's engine as `longctx train` builds it, and a function that takes one step on random tokens."""
    import torch

    import longctx
    from benchmarks.elsewhere import Elsewhere
    from longctx.config.deepspeed import to_deepspeed
    from longctx.config.derived import derive
    from longctx.config.load import loads
    from longctx.train.model import build_model, memory_of, model_config
    from longctx.train.optimizer import make_optimizer

    config = loads(text_of(CASES[case]), name=case, default_world=ranks).config
    sizes = derive(config, ranks)
    mesh, settings = longctx.Mesh(ring=sizes.ring, data=sizes.data), to_deepspeed(config, sizes)
    vocabulary = config.model.vocab_size or 0
    model = build_model(config, model_config(config, vocabulary, None), settings, mesh)
    optimizer = make_optimizer(model, config.train)
    layout, memory = config.attention.layout, memory_of(config)
    with patch("longctx.engine.activations.HostStore", Elsewhere):  # the real one leaves a CPU's tensors in place
        engine = longctx.initialize(model, settings, mesh, layout=layout, optimizer=optimizer, memory=memory)[0]

    def step() -> None:
        ids = torch.randint(0, vocabulary, (sizes.micro_batch, config.data.sequence_length))
        for batch in engine.shard([{"input_ids": ids, "labels": ids}]):
            engine.backward(engine(**batch).loss)
            engine.step()

    torch.manual_seed(0)
    return engine, step


def worker(rank: int, ranks: int, cases: list[str]) -> Iterator[int]:
    """Measure cases one after another."""
    for case in cases:
        yield measured(case, ranks)


def main() -> None:
    """Measure every case and write the table."""
    from benchmarks.ranks import run_ranks

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_memory_cpu.csv")
    output = parser.parse_args().output
    rows = []
    for ranks in (1, 2):
        cases = [case for case in CASES if ranks_of(case) == ranks]
        for case, peak in zip(cases, run_ranks(ranks, worker, cases), strict=True):
            guess, moment = predicted(case)
            error = guess / peak - 1
            rows.append({
                "case": case, "ranks": ranks, "measured_bytes": peak, "predicted_bytes": guess,
                "error": f"{error:+.4f}", "peak_at": moment, "hardware": describe(), "commit": commit(),
            })  # fmt: skip
            print(f"{case:<45} measured {peak:>12,}  predicted {guess:>12,}  {error:+.1%}", flush=True)
    write_csv(output, rows)
    missed = [row["case"] for row in rows if abs(float(row["error"])) > LIMIT]
    raise SystemExit(f"more than {LIMIT:.0%} off: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()

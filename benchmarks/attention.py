"""The attention rows: every contestant computes the same attention, is checked, and is then timed in interleaved turns.

Each rank generates the full inputs from one seed and passes every contestant the tokens it asks for. The reference is
fp64, computed once per row. Ratios are taken turn by turn.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import add_turn, gathered, largest_peak, ratio, turns
from benchmarks.measure import relative_error
from benchmarks.peers import Contestant, NotMeasured, Step, Tensors, torch_sdpa
from benchmarks.registry import CONTESTANTS, OURS, SDPA, AttentionRow

LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}  # relative error at which a contestant's results count as wrong
BF16_FACTOR = 2.0  # ours in bf16: at most this many times the error of torch's SDPA in the same run
NAMES = ("out", "dq", "dk", "dv")
PATIENCE = 40.0  # CPU seconds in a row after which a contestant gets no further turn


@dataclass
class Result:
    """One contestant's figures in one row."""

    contestant: str
    version: str = ""
    reason: str = ""  # why it was not measured, or what is wrong with its results
    errors: tuple[float, ...] = ()  # out, dq, dk, dv
    cpu: list[float] = field(default_factory=list)  # per turn, summed over ranks
    wall: list[float] = field(default_factory=list)  # per turn, the slowest rank
    blocked: list[float] = field(default_factory=list)  # per turn, the slowest rank's share of wall
    peak: int = 0  # the largest rank's


def worker(rank: int, ranks: int, rows: list[AttentionRow], without: list[str]) -> Iterator[dict[str, Any]]:
    """Run rows one after another on one rank; what rank 0 yields is the row's result."""
    for row in rows:
        yield run_row(rank, ranks, row, without)


def run_row(rank: int, ranks: int, row: AttentionRow, without: list[str]) -> dict[str, Any]:
    """Check everyone, then time them in turns."""
    inputs = make_inputs(row)
    truth = true_results(rank, ranks, row, inputs)
    ready: dict[str, tuple[Contestant, Step, Tensors]] = {}
    results = []
    for contestant in CONTESTANTS:
        result = Result(contestant.name)
        results.append(result)
        try:
            refuse(contestant, row, without)
            result.version, step = contestant.version(), contestant.load()
        except NotMeasured as error:
            result.reason = str(error)
            continue
        local = part_of(contestant, rank, ranks, inputs)
        result.errors = check(contestant, step, rank, local, part_of(contestant, rank, ranks, truth))
        ready[contestant.name] = (contestant, step, local)
        gc.collect()
        result.peak = largest_peak(partial(step, *local) if contestant.computes(rank) else None)
    judge(results, row)
    take_turns(rank, row, ready, {result.contestant: result for result in results})
    return {"row": asdict(row) | {"name": row.name}, "results": [asdict(result) for result in results]}


def refuse(contestant: Contestant, row: AttentionRow, without: list[str]) -> None:
    """Raise NotMeasured when a contestant cannot, or cannot in reasonable time, do this row."""
    if any(part in contestant.name for part in without):
        raise NotMeasured("left out")
    if contestant.longest is not None and row.length > contestant.longest:
        raise NotMeasured(f"a step takes minutes beyond {contestant.longest} tokens")
    if row.dtype not in contestant.dtypes:
        raise NotMeasured(f"its CPU path does not take {row.dtype}")


def make_inputs(row: AttentionRow) -> Tensors:
    """q, k, v and the gradient of the output, the same on every rank."""
    generator = torch.Generator().manual_seed(1234)
    heads = (row.heads, row.kv_heads, row.kv_heads, row.heads)
    made = (torch.randn(row.batch, count, row.length, row.head_dim, generator=generator) for count in heads)
    return tuple(tensor.to(getattr(torch, row.dtype)) for tensor in made)


def true_results(rank: int, ranks: int, row: AttentionRow, inputs: Tensors) -> Tensors:
    """(out, dq, dk, dv) in fp64; each rank computes every ranks-th key head, and an all-reduce adds them up."""
    step, share = torch_sdpa.load(), row.heads // row.kv_heads
    truth = tuple(torch.zeros(inputs[i].shape, dtype=torch.float64) for i in (0, 0, 1, 2))
    for head in range(rank, row.kv_heads, ranks):
        query, key = slice(head * share, (head + 1) * share), slice(head, head + 1)
        q, k, v, grad = (x[:, part].double() for x, part in zip(inputs, (query, key, key, query), strict=True))
        for whole, part, values in zip(truth, (query, query, key, key), step(q, k, v, grad), strict=True):
            whole[:, part] = values
    for whole in truth:
        dist.all_reduce(whole)
    return truth


def part_of(contestant: Contestant, rank: int, ranks: int, tensors: Tensors) -> Tensors:
    """Return this rank's part of whole (B, H, S, D) tensors, as the contestant shards them."""
    index = contestant.positions(rank, ranks, tensors[0].shape[2])
    parts = (tensor.chunk(ranks, 1)[rank] if contestant.split_heads else tensor for tensor in tensors)
    return tuple(tensor[:, :, index].contiguous() for tensor in parts)


def check(contestant: Contestant, step: Step, rank: int, local: Tensors, truth: Tensors) -> tuple[float, ...]:
    """Return the largest relative error over ranks, of out, dq, dk and dv."""
    values = step(*local) if contestant.computes(rank) else truth
    found = gathered(*(relative_error(a, b) for a, b in zip(values, truth, strict=True)))
    return tuple(max(errors) for errors in zip(*found, strict=True))


def judge(results: list[Result], row: AttentionRow) -> None:
    """Refuse to time a wrong longctx or a wrong baseline; note what is wrong with a peer's results."""
    by_name = {result.contestant: result for result in results}
    own, base = by_name[OURS.name], by_name[SDPA.name]
    limits = [LIMITS[row.dtype]] * 4
    if row.dtype == "bfloat16":
        limits = [BF16_FACTOR * error for error in base.errors]
    for name, error, limit in zip(NAMES, own.errors, limits, strict=True):
        if not error <= limit:
            raise AssertionError(f"{row.name}: longctx {name} is off by {error:.1e}, limit {limit:.1e}: not timed")
    if not max(base.errors) <= LIMITS[row.dtype]:
        raise AssertionError(f"{row.name}: the baseline itself is off by {max(base.errors):.1e}")
    for result in results:
        wrong = [
            f"{name} {error:.0e}"
            for name, error in zip(NAMES, result.errors, strict=False)
            if not error <= LIMITS[row.dtype]
        ]
        if wrong:
            result.reason = "wrong results as called here (relative error " + ", ".join(wrong) + "); timed all the same"


def take_turns(
    rank: int, row: AttentionRow, ready: dict[str, tuple[Contestant, Step, Tensors]], results: dict[str, Result]
) -> None:
    """Time everyone once per turn."""
    for _, names in turns(ready, row.repeats):
        for name in names:
            contestant, step, local = ready[name]
            if sum(results[name].cpu) <= PATIENCE:
                gc.collect()
                torch.set_num_threads(contestant.threads)
                add_turn(partial(step, *local) if contestant.computes(rank) else None, vars(results[name]))
                torch.set_num_threads(1)


def ratios(own: dict[str, Any], other: dict[str, Any], key: str = "cpu") -> float:
    """Return ours ÷ theirs."""
    return ratio(own[key], other[key])

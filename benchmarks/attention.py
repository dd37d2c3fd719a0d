"""The attention rows: every contestant computes the same attention, is checked, and is then timed in turns.

Each rank holds the full inputs (made from one seed) and gives every contestant the tokens it asks for. The truth is
fp64, computed once a row. Turns are interleaved and rotated, so that a noisy minute hits everyone alike, and ratios
are taken turn by turn.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import Sample, measure, peak_bytes, relative_error
from benchmarks.peers import Contestant, NotMeasured, Step, Tensors, torch_sdpa
from benchmarks.registry import CONTESTANTS, OURS, SDPA, AttentionRow

LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}  # relative error at which a contestant's results count as wrong
BF16_FACTOR = 2.0  # ours in bf16: at most this many times the error of torch's SDPA in the same run
NAMES = ("out", "dq", "dk", "dv")
PATIENCE = 40.0  # seconds of CPU time after which a contestant gets no further turn in a row


@dataclass
class Result:
    """What one contestant did in one row."""

    contestant: str
    version: str = ""
    reason: str = ""  # why it was not measured, or what is wrong with it
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
        result.peak = measure_peak(contestant, step, rank, local)
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
    """(out, dq, dk, dv) in fp64; each rank computes its share of the key heads and all gather."""
    step, share = torch_sdpa.load(), row.heads // row.kv_heads
    mine = range(rank, row.kv_heads, ranks)
    truth = []
    parts: dict[int, Tensors] = {}
    for head in mine:
        query = slice(head * share, (head + 1) * share)
        q, k, v, grad = (
            tensor[:, part].double()
            for tensor, part in zip(inputs, (query, slice(head, head + 1), slice(head, head + 1), query), strict=True)
        )
        parts[head] = step(q, k, v, grad)
    for position, like in enumerate((inputs[0], inputs[0], inputs[1], inputs[2])):
        full = torch.zeros(like.shape, dtype=torch.float64)
        width = like.shape[1] // row.kv_heads
        for head, values in parts.items():
            full[:, head * width : (head + 1) * width] = values[position]
        dist.all_reduce(full)
        truth.append(full)
    return tuple(truth)


def part_of(contestant: Contestant, rank: int, ranks: int, tensors: Tensors) -> Tensors:
    """What a contestant gives this rank of whole (B, H, S, D) tensors."""
    index = contestant.positions(rank, ranks, tensors[0].shape[2])
    parts = (tensor.chunk(ranks, 1)[rank] if contestant.split_heads else tensor for tensor in tensors)
    return tuple(tensor[:, :, index].contiguous() for tensor in parts)


def check(contestant: Contestant, step: Step, rank: int, local: Tensors, truth: Tensors) -> tuple[float, ...]:
    """Relative error of out, dq, dk and dv, on the rank where it is largest."""
    takes_part = contestant.ranks == "all" or rank == 0
    values = step(*local) if takes_part else truth
    errors = torch.tensor([relative_error(a, b) for a, b in zip(values, truth, strict=True)])
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    return tuple(errors.tolist())


def judge(results: list[Result], row: AttentionRow) -> None:
    """Refuse to time a wrong longctx or a wrong baseline; say of a peer what is wrong with it."""
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


def measure_peak(contestant: Contestant, step: Step, rank: int, local: Tensors) -> int:
    """Peak bytes of one step on the largest rank."""
    gc.collect()
    takes_part = contestant.ranks == "all" or rank == 0
    peak = torch.tensor([peak_bytes(lambda: step(*local)) if takes_part else 0])
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak)


def take_turns(
    rank: int, row: AttentionRow, ready: dict[str, tuple[Contestant, Step, Tensors]], results: dict[str, Result]
) -> None:
    """Time everyone once a turn, starting with another one each turn."""
    names = list(ready)
    for turn in range(row.repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if sum(results[name].cpu) <= PATIENCE:
                _turn(rank, *ready[name], results[name])


def _turn(rank: int, contestant: Contestant, step: Step, local: Tensors, result: Result) -> None:
    gc.collect()
    takes_part = contestant.ranks == "all" or rank == 0
    torch.set_num_threads(contestant.threads)
    dist.barrier()
    sample = measure(lambda: step(*local)) if takes_part else Sample(0.0, 0.0, 0.0)
    torch.set_num_threads(1)
    known = sample.blocked is not None
    mine = torch.tensor([sample.cpu, sample.wall, sample.blocked if known else float("nan")], dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone)
    result.cpu.append(float(table[:, 0].sum()))
    result.wall.append(float(table[:, 1].max()))
    result.blocked.append(float(table[:, 2].max() / table[:, 1].max()))


def ratios(own: dict[str, Any], other: dict[str, Any], key: str = "cpu") -> float:
    """Median over turns of ours ÷ theirs; turns that only one of them had are left out."""
    return median(a / b for a, b in zip(own[key], other[key], strict=False))

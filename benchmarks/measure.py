"""Measure one call: CPU time, wall time, time blocked on other ranks, and exact bytes. Nothing is sampled.

CPU time is that of the process (gloo's threads included), so it holds on a busy machine; wall time holds on a quiet one
only, which is why every row carries the load. ``blocked`` is the time in which the computing thread was neither running
nor waiting for a core: it waited for another rank, so this communication was not overlapped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

_CPU = torch.profiler.ProfilerActivity.CPU
_TO_DROP = 0.0005  # seconds after which gloo's thread has released a finished collective
_SCHEDSTAT = Path("/proc/thread-self/schedstat")


def _scheduled() -> tuple[float, float] | None:
    """(seconds on a core, seconds waiting for one) of this thread, where the kernel reports them."""
    try:
        on_core, waiting, _ = _SCHEDSTAT.read_text().split()
    except (OSError, ValueError):
        return None
    return int(on_core) / 1e9, int(waiting) / 1e9


@dataclass(frozen=True)
class Sample:
    """One call. Seconds; ``blocked`` is None where the kernel does not report it."""

    cpu: float
    wall: float
    blocked: float | None


def measure(call: Callable[[], Any]) -> Sample:
    """Run ``call`` once and measure it in this process."""
    scheduled, cpu, wall = _scheduled(), time.process_time(), time.perf_counter()
    call()
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    after = _scheduled()
    if scheduled is None or after is None:
        return Sample(cpu, wall, None)
    return Sample(cpu, wall, max(wall - (after[0] - scheduled[0]) - (after[1] - scheduled[1]), 0.0))


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the peak bytes of ``call`` beyond what was allocated before it, to the byte (CPU allocations)."""
    with frees_seen(), torch.profiler.profile(activities=[_CPU], profile_memory=True) as profiler:
        result = call()
    del result
    return max(accumulate(allocations(profiler), initial=0))


def allocations(profiler: Any) -> list[int]:
    """Return the bytes of every allocation (frees are negative) that a profiler recorded, in order of time."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextmanager
def frees_seen() -> Iterator[None]:
    """Let gloo's threads release a finished collective before its waiter continues.

    The profiler does not see what other threads free: a tensor that loses its last reference there would count as
    allocated from then on, by chance a few MB in a training step.
    """
    wait = torch.distributed.Work.wait

    def wait_and_yield(work: torch.distributed.Work, *arguments: Any, **named: Any) -> Any:
        done = wait(work, *arguments, **named)
        time.sleep(_TO_DROP)
        return done

    torch.distributed.Work.wait = wait_and_yield
    try:
        yield
    finally:
        torch.distributed.Work.wait = wait


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in fp64; infinite where value is not finite."""
    difference = (value.double() - truth.double()).norm() / truth.double().norm()
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")

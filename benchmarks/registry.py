"""Every row that `make bench` measures, and its requirements. Nothing else is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import ours
from benchmarks.peers import (
    Contestant,
    deepspeed_ulysses,
    ring_attention_pytorch,
    torch_context_parallel,
    torch_sdpa,
)

OURS = ours.CONTESTANT
SDPA = torch_sdpa.TWO_THREADS  # one process that uses the machine as the two ranks do; one thread is shown beside it
ULYSSES = deepspeed_ulysses.CONTESTANT
TORCH_RING = torch_context_parallel.CONTESTANT
PLAIN_RING = ring_attention_pytorch.CONTESTANT
CONTESTANTS: tuple[Contestant, ...] = (
    OURS,
    SDPA,
    torch_sdpa.ONE_THREAD,
    torch_sdpa.IDEAL,
    ours.HYBRID,
    ULYSSES,
    TORCH_RING,
    PLAIN_RING,
)


@dataclass(frozen=True)
class AttentionRow:
    """Causal attention forward + backward over ``length`` tokens on ``ranks`` CPU ranks."""

    length: int
    dtype: str
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    batch: int = 1
    repeats: int = 7
    ranks: int = 2

    @property
    def name(self) -> str:
        ranks = "" if self.ranks == 2 else f"-r{self.ranks}"
        return f"attention-{self.length}-{self.dtype}-h{self.heads}g{self.kv_heads}{ranks}"


@dataclass(frozen=True)
class MemoryRow:
    """Peak bytes of ring attention per rank at ``local`` tokens per rank."""

    local: int
    ranks: int


@dataclass(frozen=True)
class StepRow:
    """One optimizer step of a small Llama under ZeRO-3, its sequence sharded over ``ranks``."""

    length: int = 8192
    ranks: int = 2
    layers: int = 4
    hidden: int = 256
    intermediate: int = 704
    heads: int = 8
    kv_heads: int = 2
    vocabulary: int = 8192
    steps: int = 5


@dataclass(frozen=True)
class Required:
    """ours ÷ theirs must not exceed ``ratio`` in CPU time, for rows of ``dtype`` from ``length`` on."""

    against: Contestant
    dtype: str
    length: int
    ratio: float


# Longer rows have fewer heads: attention is quadratic, and the benchmark should end within half an hour.
ATTENTION_ROWS = tuple(
    AttentionRow(length, dtype, heads=heads, kv_heads=kv_heads, repeats=repeats)
    for dtype in ("float32", "bfloat16")
    for length, heads, kv_heads, repeats in (
        (2048, 8, 8, 15),
        (4096, 8, 8, 9),
        (8192, 8, 8, 7),
        (8192, 8, 2, 5),
        (16384, 4, 4, 5),
        (32768, 2, 2, 3),
    )
) + tuple(AttentionRow(4096, "float32", kv_heads=kv_heads, repeats=5, ranks=4) for kv_heads in (8, 4))  # hybrid
QUICK_ATTENTION_ROWS = (AttentionRow(1024, "float32", repeats=3), AttentionRow(1024, "bfloat16", repeats=3))

MEMORY_ROWS = (
    *(MemoryRow(2048, ranks) for ranks in (1, 2, 4, 8)),
    MemoryRow(4096, 2),
    MemoryRow(8192, 2),
)
QUICK_MEMORY_ROWS = (MemoryRow(1024, 2), MemoryRow(2048, 2))

STEP_ROW = StepRow()
QUICK_STEP_ROW = StepRow(length=1024, layers=2, hidden=64, intermediate=128, vocabulary=512, steps=2)

REQUIRED = (
    Required(SDPA, "float32", 8192, 1.02),
    Required(SDPA, "bfloat16", 8192, 1.05),
    *(Required(peer, dtype, 2048, 1.00) for peer in (ULYSSES, TORCH_RING) for dtype in ("float32", "bfloat16")),
    *(Required(PLAIN_RING, dtype, 2048, 1 / 7) for dtype in ("float32", "bfloat16")),
)


def requirements(length: int, dtype: str) -> Iterator[Required]:
    """Return the requirements on one row."""
    return (required for required in REQUIRED if required.dtype == dtype and length >= required.length)

"""Every attention row that `make bench-gpu` measures, and the requirements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Attention forward and backward, bf16, on one GPU.

    ring: also computed as this many ranks' steps in sequence, each as on a zigzag ring, and compared with one call.
    documents: packed in one row, of equal length. window: keys that a query sees.
    """

    length: int
    head_dim: int = 128
    causal: bool = True
    heads: int = 16
    kv_heads: int = 16
    batch: int = 1
    documents: int = 1
    window: int | None = None
    ring: int = 1
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        parts = [f"{self.length}", f"d{self.head_dim}", "causal" if self.causal else "full"]
        parts += [f"h{self.heads}g{self.kv_heads}", f"b{self.batch}"]
        if self.documents > 1:
            parts.append(f"{self.documents}documents")
        if self.window is not None:
            parts.append(f"window{self.window}")
        if self.ring > 1:
            parts.append(f"ring{self.ring}")
        return "-".join(parts)


@dataclass(frozen=True)
class Required:
    """theirs ÷ ours in time must be at least `ratio`, for causal rows of head dimension 128 from `length` on."""

    contestant: str
    direction: str
    ratio: float
    length: int = 16384
    ours: str = "longctx"


def _grid() -> tuple[Row, ...]:
    """Follow the published charts: 16K tokens per batch while the sequence is shorter, 2048 values per token."""
    return tuple(
        Row(length, dim, causal, heads=2048 // dim, kv_heads=2048 // dim, batch=max(1, 16384 // length))
        for dim in (128, 64, 256)
        for causal in (True, False)
        for length in (2048, 8192, 16384, 32768, 131072)
        if causal or length in (2048, 16384)
    )


FIRST: tuple[Row, ...] = (
    Row(16384),
    Row(32768),
    Row(2048, batch=8),
    Row(16384, heads=32, kv_heads=4),
    Row(65536, ring=8),
    Row(65536, documents=16),
)
"""The most important rows, measured first in case the time is up before the rest."""
_MORE = (
    Row(32768, heads=64, kv_heads=8), Row(65536, window=4096), Row(16384, ring=8, batch=2),
    Row(65536, heads=32, kv_heads=4, ring=8),
)  # fmt: skip
ROWS: tuple[Row, ...] = tuple(dict.fromkeys((*FIRST, *_grid(), *_MORE)))
TINY: tuple[Row, ...] = (
    Row(128, 16, True, 2, 2, dtype="float32"),
    Row(128, 16, False, 2, 1, dtype="float32"),
    Row(64, 16, True, 2, 1, documents=4, dtype="float32"),
    Row(64, 16, True, 2, 1, window=32, dtype="float32"),
    Row(64, 16, True, 2, 1, ring=4, dtype="float32"),
)
"""For the interpreter: the same code on a machine without a GPU. Its times mean nothing and are not written."""

REQUIRED = (
    Required("FlexAttention", "forward", 1.25),
    Required("FlexAttention", "backward", 1.5),
    Required("tutorial", "forward", 1.1),
    Required("tutorial", "backward", 1.5),
    Required("SDPA cuDNN", "forward", 1.0, ours="longctx, TMA"),
    Required("SDPA cuDNN", "backward", 1.0, ours="longctx, TMA"),
)
SPLIT = 0.97
"""One call's time ÷ the ring's, from 8192 tokens per step on."""

"""Every row that `make bench-gpu` measures, and what ours must reach. Nothing is measured that is not listed here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Attention forward and backward, bf16, on one GPU.

    ring: the sequence is computed as this many ring steps in sequence, as rank 0's share of a zigzag ring would be, and
        compared with one call. documents: so many of equal length, packed in one row. window: keys a query sees.
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
    """The published charts' convention: 16K tokens a batch while the sequence is shorter, 2048 numbers a token."""
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
"""What matters most, in case the minutes do not suffice for the rest."""
ROWS: tuple[Row, ...] = tuple(
    dict.fromkeys(
        (
            *FIRST,
            *_grid(),
            Row(32768, heads=64, kv_heads=8),
            Row(65536, window=4096),
            Row(16384, ring=8, batch=2),
            Row(65536, heads=32, kv_heads=4, ring=8),
        )
    )
)
TINY: tuple[Row, ...] = (
    Row(128, 16, True, 2, 2, dtype="float32"),
    Row(128, 16, False, 2, 1, dtype="float32"),
    Row(64, 16, True, 2, 1, documents=4, dtype="float32"),
    Row(64, 16, True, 2, 1, window=32, dtype="float32"),
    Row(64, 16, True, 2, 1, ring=4, dtype="float32"),
)
"""For the interpreter: the same code on a machine without a GPU. Its times mean nothing and are not kept."""

REQUIRED = (
    Required("FlexAttention", "forward", 1.25),
    Required("FlexAttention", "backward", 1.5),
    Required("tutorial", "forward", 1.1),
    Required("tutorial", "backward", 1.5),
    Required("SDPA cuDNN", "forward", 1.0, ours="longctx, TMA"),
    Required("SDPA cuDNN", "backward", 1.0, ours="longctx, TMA"),
)
SPLIT = 0.97
"""One call's time over the ring's, from 8192 tokens a step on."""

"""Decoding's rows of `python -m benchmarks.gpu.run`: one token's attention to a long context, in gigabytes per second.

A step reads the cache once and does little else, so the measure is how close it comes to the memory's bandwidth. EL is
compared with the same context as keys and values of every head, kept once for all beams: the strongest plain cache.
Results are checked against fp64 at a smaller size first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu import figures, measure
from benchmarks.gpu.figures import OURS, Figure, Run, Table, need_gpu
from benchmarks.measure import relative_error
from benchmarks.peers import NotMeasured
from longctx.decode.attend import decode_attention

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One new token for each of batch x beams rows.

    value_width: values are that many columns of the keys; None: a tensor of their own. key_heads: of the cache; 1 for
        EL's hidden states and MLA's latents.
    """

    kind: str
    batch: int
    beams: int
    heads: int
    key_heads: int
    keys: int
    key_width: int
    value_width: int | None = None
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        heads = f"h{self.heads}g{self.key_heads}"
        return f"decode-{self.kind}-{self.keys}-d{self.key_width}-{heads}-b{self.batch}x{self.beams}"

    @property
    def bytes(self) -> int:
        """Bytes of the cache, which have to be read."""
        numbers = self.key_width if self.value_width else 2 * self.key_width
        return self.batch * self.key_heads * self.keys * numbers * getattr(torch, self.dtype).itemsize


ROWS = (
    Row("el", 8, 4, 16, 1, 1024, 1024, 1024),
    Row("el", 64, 4, 16, 1, 1024, 1024, 1024),
    Row("el", 8, 1, 16, 1, 16384, 1024, 1024),
    Row("el", 8, 4, 12, 1, 16384, 768, 768),
    Row("mla", 4, 1, 128, 1, 32768, 576, 512),
    Row("mla", 1, 1, 16, 1, 131072, 576, 512),
    Row("gqa", 1, 1, 32, 8, 131072, 128),
    Row("gqa", 16, 1, 32, 8, 8192, 128),
    Row("mqa", 4, 1, 32, 1, 65536, 128),
)
TINY = (
    Row("el", 1, 2, 2, 1, 40, 24, 24, "float32"),
    Row("mla", 1, 1, 3, 1, 40, 40, 32, "float32"),
    Row("gqa", 2, 1, 4, 2, 40, 16, dtype="float32"),
)
"""For the interpreter."""


@dataclass
class Inputs:
    """q (B * beams, H, 1, D), k (B, G, S, D), v (B, G, S, Dv) or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None


def make_inputs(row: Row, device: torch.device) -> Inputs:
    g = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device).to(getattr(torch, row.dtype))

    cache = row.batch, row.key_heads, row.keys, row.key_width
    q = random(row.batch * row.beams, row.heads, 1, row.key_width)
    return Inputs(q, random(*cache), None if row.value_width else random(*cache))


def _ours(backend: str) -> Callable[[Row, Inputs], Call]:
    def prepare(row: Row, x: Inputs) -> Call:
        return lambda: decode_attention(x.q, x.k, x.v, value_width=row.value_width, backend=backend)[0]

    return prepare


def _sdpa(row: Row, x: Inputs) -> Call:
    """torch's operator, with everything that reads the same keys as queries of one head."""
    need_gpu(x.q)
    values = x.k[..., : row.value_width] if x.v is None else x.v
    group = row.heads // row.key_heads

    def call() -> torch.Tensor:
        q = x.q.view(row.batch, row.beams, row.key_heads, group, -1).transpose(1, 2).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, x.k, values)
        return out.unflatten(2, (row.beams, group)).transpose(1, 2).reshape(x.q.shape[0], row.heads, 1, -1)

    return call


def _sdpa_grouped(row: Row, x: Inputs) -> Call:
    """torch's operator as models call it."""
    need_gpu(x.q)
    if x.v is None or row.beams > 1:
        raise NotMeasured("for grouped keys and values without beams")
    return lambda: F.scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=True)


KEY_VALUES = "SDPA over keys and values, once for all beams"


def _key_values(row: Row, x: Inputs) -> Call:
    """What EL replaces: timed, but computing something else, so its results are not checked."""
    if row.kind != "el" or x.q.device.type != "cuda":
        raise NotMeasured("for EL, on a GPU")
    shape = row.batch, row.heads, row.keys, row.key_width // row.heads
    k, v = (torch.randn(shape, device=x.k.device).to(x.k.dtype) for _ in range(2))
    q = torch.randn((*shape[:2], row.beams, shape[3]), device=k.device).to(k.dtype)
    return lambda: F.scaled_dot_product_attention(q, k, v)


CONTESTANTS: dict[str, Callable[[Row, Inputs], Call]] = {
    OURS: _ours("triton"), "longctx, torch": _ours("torch"), "SDPA": _sdpa, "SDPA, grouped": _sdpa_grouped,
    KEY_VALUES: _key_values,
}  # fmt: skip


def run(this: Run) -> list[str]:
    """Measure every wanted row, append its figures to decode_gpu.csv, return what is wrong."""
    results, measured = this.results("decode", ("ms", "cache_bytes")), partial(_measure, this.device)
    table = Table(results, ("ms",), CONTESTANTS, measured, _line, lambda figure: (figure.bytes,))
    return figures.wrong(table.run(this.rows(ROWS, TINY)))


def _measure(device: torch.device, figure: Figure) -> None:
    row, name = figure.row, figure.contestant
    figure.bytes = row.bytes
    if name != KEY_VALUES:
        small = replace(row, batch=1, keys=min(row.keys, measure.LONGEST_CHECK))
        figures.compare(figure, _error(small, name, device), measure.LIMITS[row.dtype])
    with torch.no_grad():
        figure.forward = measure.seconds_of(CONTESTANTS[name](row, make_inputs(row, device)), device)


def _error(row: Row, name: str, device: torch.device) -> float:
    x = make_inputs(row, device)
    values = None if x.v is None else x.v.double()
    truth = decode_attention(x.q.double(), x.k.double(), values, value_width=row.value_width, backend="torch")[0]
    return relative_error(CONTESTANTS[name](row, x)(), truth)


def _line(row: Row, measured: list[Figure]) -> str:
    times = [(f.contestant, f.forward) for f in measured if f.forward]
    said = [f"{name} {row.bytes / seconds / 1e9:.3g} ({seconds * 1e3:.3f} ms)" for name, seconds in times]
    return f"{row.name}: GB/s of the cache: " + ", ".join(said)

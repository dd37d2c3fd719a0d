"""Build the launches of the cosine kernels: five in forward and seven in backward at any length. None waits for the
device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ..flash.launch import Launch
from . import tiles
from .lengths import lengths_kernel
from .product import product_kernel
from .states import scan_kernel, write_kernel

WIDEST = 256
"""Largest head dimension."""
Optional = torch.Tensor | None


@dataclass(frozen=True)
class Documents:
    """Documents of packed rows. ids (B, T) int64, -1 at padding; edges (B, chunks + 1) int64, the document of the state
    at each boundary; kept (B, chunks) fp32, 1 if the state before a chunk is still that after it, else 0."""

    ids: torch.Tensor
    edges: torch.Tensor
    kept: torch.Tensor


@dataclass(frozen=True)
class Side:
    """Queries or keys. x (B, heads, T, D); inverse, 1 / ||x||, and factor, inverse times the scale, (B, heads, T)
    fp32."""

    x: torch.Tensor
    inverse: torch.Tensor
    factor: torch.Tensor


@dataclass(frozen=True)
class Causal:
    """One call of causal cosine attention.

    q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv): one dtype of bf16, fp16, fp32; any strides with a dense last
    dimension. size = n^-a, fp32: (B, H, T) if on_query, else (B, G, T).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    size: torch.Tensor
    on_query: bool
    documents: Documents | None
    arch: str

    @property
    def chunk(self) -> int:
        return self._config("output").chunk

    @property
    def chunks(self) -> int:
        return -(-self.q.shape[2] // self.chunk)

    def lengths(self, queries: bool) -> tuple[Launch, Side]:
        """Return the launch that computes the factors of one side."""
        x, sized = (self.q, self.on_query) if queries else (self.k, not self.on_query)
        batch, heads, length, width = x.shape
        inverse = torch.empty((batch, heads, length), dtype=torch.float32, device=x.device)
        factor = torch.empty_like(inverse) if sized else inverse
        size = self.size if sized else inverse
        arguments = {
            "x": x, "size": size, "ids": self._ids, "inverse": inverse, "factor": factor, **strides("x", x),
            **strides("s", size), "head_count": heads, "length": length, "TILE": 64, "DX": width,
            "WX": padded(width), "SIZED": sized, "DOCUMENTS": self.documents is not None,
        }  # fmt: skip
        return Launch(lengths_kernel, (-(-length // 64), batch * heads), arguments), Side(x, inverse, factor)

    def states(self) -> torch.Tensor:
        """Allocate the state at each boundary of chunks, or its gradient: (B, G, chunks + 1, D, Dv)."""
        shape = (*self.k.shape[:2], self.chunks + 1, self.k.shape[3], self.v.shape[3])
        return torch.empty(shape, dtype=torch.float32, device=self.k.device)

    def write(self, side: Side, x: torch.Tensor, states: torch.Tensor, after: bool) -> Launch:
        """Return the launch that computes what each chunk adds: from (k, v) to the state after it, from (q, dO) to the
        gradient of the state before it."""
        config = self._config("write")
        d_a, d_x, group = side.x.shape[3], x.shape[3], side.x.shape[1] // self.k.shape[1]
        t_a, t_x = min(config.step, padded(d_a)), min(config.step, padded(d_x))
        arguments = {
            "a": side.x, "x": x, "factor": side.factor, "ids": self._ids, "edges": self._edges, "states": states,
            **strides("a", side.x), **strides("x", x), "state_heads": self.k.shape[1], "group": group,
            "length": self.q.shape[2], "chunks": self.chunks, "CHUNK": config.chunk, "DA": d_a, "DX": d_x,
            "TA": t_a, "TX": t_x, "AFTER": int(after), "DOCUMENTS": self.documents is not None,
        }  # fmt: skip
        grid = (self.chunks, -(-d_a // t_a) * -(-d_x // t_x), self.k.shape[0] * self.k.shape[1])
        return Launch(write_kernel, grid, arguments, config.warps, config.stages)

    def scan(self, states: torch.Tensor, start: torch.Tensor, down: bool) -> Launch:
        """Return the launch that sums what the chunks add into states, starting with `start` (B, G, D, Dv); `down`:
        from the last chunk to the first."""
        kept = None if self.documents is None else self.documents.kept
        return scan(states, start, None if kept is None else kept[:, None, :, None], down)

    def output(self, queries: Side, keys: Side, states: torch.Tensor, out: torch.Tensor) -> Launch:
        """Write out (B, H, T, Dv)."""
        return self._product("output", (queries, self.q, self.k, self.v), keys, states, out, None, None)

    def queries(
        self, queries: Side, keys: Side, dout: torch.Tensor, states: torch.Tensor, dq: torch.Tensor, dsize: Optional
    ) -> Launch:
        """Write dq, and dsize (B, H, T) fp32 if on_query; `states` are forward's."""
        return self._product("queries", (queries, dout, self.v, self.k), keys, states, dq, queries, dsize)

    def keys(
        self, queries: Side, keys: Side, dout: torch.Tensor, states: torch.Tensor, dk: torch.Tensor, dsize: Optional
    ) -> Launch:
        """Write dk, and dsize (B, G, T) fp32 unless on_query; `states` are the gradients."""
        return self._product("keys", (keys, self.v, dout, self.q), queries, states, dk, keys, dsize)

    def values(
        self, queries: Side, keys: Side, dout: torch.Tensor, states: torch.Tensor, dv: torch.Tensor
    ) -> Launch:  # fmt: skip
        """Write dv."""
        return self._product("values", (keys, self.k, self.q, dout), queries, states, dv, None, None)

    def _product(
        self, name: str, given: Any, other: Side, states: torch.Tensor, out: torch.Tensor, unit: Side | None,
        dsize: Optional,
    ) -> Launch:  # fmt: skip
        own, a, b, x = given
        config, d_v = self._config(name), self.v.shape[3]
        upright = name in ("output", "values")
        row_of = out if unit is None else unit.x
        arguments = {
            "a": a, "b": b, "x": x, "own": own.factor, "other": other.factor, "states": states, "ids": self._ids,
            "edges": self._edges, "out": out, "row_of": row_of, "inverse": own.inverse, "dsize": dsize,
            **strides("a", a), **strides("b", b), **strides("x", x), **strides("o", out), **strides("y", row_of),
            "state_row": d_v if upright else 1, "state_column": 1 if upright else d_v, "head_count": a.shape[1],
            "group": self.q.shape[1] // self.k.shape[1], "length": a.shape[2], "chunks": self.chunks,
            "CHUNK": config.chunk, "STEP": min(config.step, padded(a.shape[3])), "DA": a.shape[3],
            "WA": padded(a.shape[3]), "DX": x.shape[3], "WX": padded(x.shape[3]),
            "REVERSED": int(name in ("keys", "values")), "DOCUMENTS": self.documents is not None,
            "UNIT": unit is not None, "SIZED": dsize is not None,
        }  # fmt: skip
        return Launch(product_kernel, (self.chunks, a.shape[0] * a.shape[1]), arguments, config.warps, config.stages)

    def _config(self, name: str) -> tiles.Config:
        width = max(self.q.shape[3], self.v.shape[3])
        return tiles.choose(name, width, self.q.dtype.itemsize, self.arch)

    @property
    def _ids(self) -> Optional:
        return None if self.documents is None else self.documents.ids

    @property
    def _edges(self) -> Optional:
        return None if self.documents is None else self.documents.edges


def scan(states: torch.Tensor, start: torch.Tensor, factors: Optional, down: bool) -> Launch:
    """Return the launch that sums states (B, heads, chunks + 1, D, Dv), fp32, over chunks in place, starting with start
    (B, heads, D, Dv); factors, by which a state decays, broadcast to (B, heads, chunks, D), or None."""
    batch, heads, slots, rows, width = states.shape
    if factors is not None:
        factors = factors.expand(batch, heads, slots - 1, rows)
    apart = (0,) * 4 if factors is None else factors.stride()
    arguments = {
        "states": states, "start": start, "factors": factors,
        **dict(zip(("fb", "fh", "fc", "fr"), apart, strict=True)),
        "head_count": heads, "chunks": slots - 1, "TILE": 128, "NUMBERS": rows * width, "WIDTH": width,
        "DOWN": int(down), "FACTORS": factors is not None, "AHEAD": 4,
    }  # fmt: skip
    return Launch(scan_kernel, (-(-rows * width // 128), batch * heads), arguments, 2)


def padded(width: int) -> int:
    """Return the power of two, at least 16, to which kernels pad a head dimension."""
    return max(16, triton.next_power_of_2(width))


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    """Return batch, head and token strides; the last dimension is dense."""
    return {f"{name}{axis}": x.stride(dim) for axis, dim in zip("bht", range(3), strict=True)}

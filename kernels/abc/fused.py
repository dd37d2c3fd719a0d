"""Build the launches of ABC's kernels. Their number does not depend on the length, and none waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ..cosine.fused import Documents, padded, scan, strides
from ..flash.launch import Launch
from . import tiles
from .columns import columns_kernel
from .masses import masses_kernel, walk_kernel
from .rows import rows_kernel
from .states import write_kernel

WIDEST = 128
"""Largest head dimension, and most slots."""
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Masses(NamedTuple):
    """Log masses: z of every token (B, G, T, M); boundary, before each chunk and after the last (B, G, chunks + 1, M);
    fp32."""

    z: torch.Tensor
    boundary: torch.Tensor


class Reads(NamedTuple):
    """p, g and c of rows.py for every query, which the other launches of backward read; (B, H, T, M) fp32."""

    p: torch.Tensor
    g: torch.Tensor
    c: torch.Tensor


@dataclass(frozen=True)
class Causal:
    """One call of causal ABC.

    q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv): one dtype of bf16, fp16, fp32. s (B, G, T, M): control logits, of
    any of these dtypes. Any strides with a dense last dimension. States are (B, G, chunks + 1, M, D), fp32: one per
    boundary of chunks.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    s: torch.Tensor
    scale: float
    documents: Documents | None
    arch: str

    @property
    def chunk(self) -> int:
        return self._config("output").chunk

    @property
    def chunks(self) -> int:
        return -(-self.q.shape[2] // self.chunk)

    def masses(self, start: torch.Tensor) -> tuple[tuple[Launch, ...], Masses]:
        """Return the launches, in order, that compute the log masses that follow `start` (B, G, M)."""
        batch, heads, length, slots = self.s.shape
        z, boundary = (self._empty((batch, heads, tokens, slots)) for tokens in (length, self.chunks + 1))
        shared = {"boundary": boundary, "edges": self._edges, "head_count": heads, "chunks": self.chunks,
                  "SLOTS": slots, "WM": padded(slots), "DOCUMENTS": self.documents is not None}  # fmt: skip
        rows = {**shared, "s": self.s, "ids": self._ids, "z": z, **strides("s", self.s), "length": length,
                "CHUNK": self.chunk}  # fmt: skip
        sums, found = (
            Launch(masses_kernel, (self.chunks, batch * heads), {**rows, "ROWS": second}, 1) for second in (False, True)
        )
        walk = Launch(walk_kernel, (batch * heads,), {**shared, "start": start}, 1)
        return (sums, walk, found), Masses(z, boundary)

    def factors(self, masses: Masses) -> torch.Tensor:
        """Return the factor by which each slot of the state decays over each chunk, (B, G, chunks, M)."""
        before, after = masses.boundary[:, :, :-1], masses.boundary[:, :, 1:]
        found = (before - after.masked_fill(after == -torch.inf, 0.0)).clamp_max(0.0).exp()
        return found if self.documents is None else found * self.documents.kept[:, None, :, None]

    def write(self, x: torch.Tensor, masses: Masses, y: torch.Tensor | None = None) -> tuple[Launch, torch.Tensor]:
        """Return the launch that computes what each chunk of x (B, G, T, X) adds to the state after it. With y (B, H,
        T, M) and x (B, H, T, X): what each chunk adds to the gradient of the state before it."""
        batch, heads, _, slots = self.s.shape
        states = self._empty((batch, heads, self.chunks + 1, slots, x.shape[3]))
        config = self._config("recall" if y is not None else "write")
        arguments = {
            "s": self.s, "y": y, "x": x, "z": masses.z, "boundary": masses.boundary, "ids": self._ids,
            "edges": self._edges, "states": states, **strides("s", self.s), **strides("x", x), "state_heads": heads,
            "group": x.shape[1] // heads, **self._numbers(config), "DX": x.shape[3],
            "WX": padded(x.shape[3]), "AFTER": int(y is None), "TYPE": _TYPES[self.q.dtype],
        }  # fmt: skip
        return self._launch(write_kernel, heads, arguments, config), states

    def scan(self, states: torch.Tensor, start: torch.Tensor, masses: Masses, down: bool) -> Launch:
        """Return the launch that sums what the chunks add into states, starting with `start` (B, G, M, X); `down`: from
        the last chunk to the first."""
        return scan(states, start, self.factors(masses), down)

    def output(self, masses: Masses, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> Launch:
        """Write out (B, H, T, Dv)."""
        return self._rows("output", masses, keys, values, out, None, None)

    def queries(
        self, masses: Masses, keys: torch.Tensor, values: torch.Tensor, dout: torch.Tensor, dq: torch.Tensor
    ) -> tuple[Launch, Reads]:
        """Write dq (B, H, T, D), dense, and the `Reads` that the other launches of backward need."""
        shape = (*self.q.shape[:3], self.s.shape[3])
        reads = Reads(*(self._empty(shape) for _ in range(3)))
        return self._rows("queries", masses, keys, values, dout, dq, reads), reads

    def keys(
        self, x: torch.Tensor, readers: torch.Tensor, y: torch.Tensor, masses: Masses, gradient: torch.Tensor,
        dx: torch.Tensor,
    ) -> Launch:  # fmt: skip
        """Write dx, for x = k, readers = q, y = g, or for x = v, readers = dO, y = p. `gradient`: of their state."""
        return self._columns("keys", x, readers, y, masses, gradient, dx, True)

    def control(
        self, x: torch.Tensor, readers: torch.Tensor, y: torch.Tensor, masses: Masses, gradient: torch.Tensor,
        ds: torch.Tensor, first: bool,
    ) -> Launch:  # fmt: skip
        """Write one state's part of ds (B, G, T, M), fp32 and dense, if `first`; else add it."""
        return self._columns("control", x, readers, y, masses, gradient, ds, first)

    def mass(self, c: torch.Tensor, masses: Masses, gradient: torch.Tensor, ds: torch.Tensor) -> Launch:
        """Subtract the gradient of the division by the mass from ds."""
        ones = self.ones(self.k.shape[1])
        return self._columns("mass", ones, ones, c, masses, gradient, ds, False)

    def ones(self, heads: int) -> torch.Tensor:
        """Return ones (B, heads, T, 1) in q's dtype, a view of one number: the x whose state is the mass."""
        return torch.ones((1, 1, 1, 1), dtype=self.q.dtype, device=self.q.device).expand(
            self.q.shape[0], heads, self.q.shape[2], 1
        )

    def _rows(
        self, name: str, masses: Masses, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor,
        dq: torch.Tensor | None, reads: Reads | None,
    ) -> Launch:  # fmt: skip
        config, backward = self._config(name), reads is not None
        p, g, c = (None, None, None) if reads is None else reads
        arguments = {
            "q": self.q, "k": self.k, "v": self.v, "s": self.s, "z": masses.z, "boundary": masses.boundary,
            "keys": keys, "values": values, "ids": self._ids, "edges": self._edges, "out": None if backward else out,
            "dout": out if backward else None, "dq": dq, "p_out": p, "g_out": g, "c_out": c,
            **strides("q", self.q), **strides("k", self.k), **strides("v", self.v), **strides("s", self.s),
            **strides("o", out), "head_count": self.q.shape[1], "group": self.q.shape[1] // self.k.shape[1],
            "scale": float(self.scale), **self._numbers(config), "LEVELS": config.chunk.bit_length() - 1,
            "DK": self.k.shape[3], "WK": padded(self.k.shape[3]), "DV": self.v.shape[3],
            "WV": padded(self.v.shape[3]), "BACKWARD": backward,
        }  # fmt: skip
        return self._launch(rows_kernel, self.q.shape[1], arguments, config)

    def _columns(
        self, name: str, x: torch.Tensor, readers: torch.Tensor, y: torch.Tensor, masses: Masses,
        gradient: torch.Tensor, out: torch.Tensor, first: bool,
    ) -> Launch:  # fmt: skip
        config, heads = self._config(name), self.k.shape[1]
        arguments = {
            "x": x, "read_by": readers, "y": y, "s": self.s, "z": masses.z, "boundary": masses.boundary,
            "memory": gradient, "ids": self._ids, "edges": self._edges, "out": out, **strides("x", x),
            **strides("r", readers), **strides("s", self.s), "head_count": heads, "group": y.shape[1] // heads,
            **self._numbers(config), "LEVELS": config.chunk.bit_length() - 1, "DX": x.shape[3],
            "WX": padded(x.shape[3]), "CONTROL": name != "keys", "FIRST": first, "MASS": name == "mass",
        }  # fmt: skip
        return self._launch(columns_kernel, heads, arguments, config)

    def _numbers(self, config: tiles.Config) -> dict[str, Any]:
        slots = self.s.shape[3]
        return {"length": self.q.shape[2], "chunks": self.chunks, "CHUNK": config.chunk, "SLOTS": slots,
                "WM": padded(slots), "DOCUMENTS": self.documents is not None}  # fmt: skip

    def _launch(self, kernel: Any, heads: int, arguments: dict[str, Any], config: tiles.Config) -> Launch:
        return Launch(kernel, (self.chunks, self.q.shape[0] * heads), arguments, config.warps, config.stages)

    def _config(self, name: str) -> tiles.Config:
        width = max(self.q.shape[3], self.v.shape[3], self.s.shape[3])
        return tiles.choose(name, width, self.q.dtype.itemsize, self.arch)

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    @property
    def _ids(self) -> torch.Tensor | None:
        return None if self.documents is None else self.documents.ids

    @property
    def _edges(self) -> torch.Tensor | None:
        return None if self.documents is None else self.documents.edges

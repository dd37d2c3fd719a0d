"""Build the launches of the fused operator from tensors and geometry: one per ring step in forward; in backward, one
for all steps (`prepare`) and two per step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .backward_keys import keys_kernel
from .backward_queries import queries_kernel
from .documents import narrow
from .forward import forward_kernel
from .launch import Launch
from .preprocess import preprocess_kernel
from .reference import Scores
from .tables import Geometry, Table, index_table

LOG2E = 1.4426950408889634
WIDEST = 256
"""Largest head dimension."""
Documents = tuple[torch.Tensor, torch.Tensor] | None
"""(B, Tq) and (B, Tk) document ids."""


class Prepared(NamedTuple):
    """What all steps of one backward share. lse2 (B, H, T) fp32: the lse times log2(e), +inf for rows that saw no key;
    delta (B, H, T) fp32."""

    q: torch.Tensor
    dout: torch.Tensor
    lse2: torch.Tensor
    delta: torch.Tensor


@dataclass(frozen=True)
class Step:
    """One block of queries with one block of keys.

    q (B, H, Tq, Dk), k (B, G, Tk, Dk), v (B, G, Tk, Dv): one dtype of bf16, fp16, fp32; any strides. `geometry` has
    queries as rows. `choose` returns tile sizes, as tiles.choose does.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    geometry: Geometry
    documents: Documents
    scores: Scores
    arch: str
    choose: Callable[..., tiles.Config] = tiles.choose

    def forward(self, out: torch.Tensor, lse: torch.Tensor, first: bool) -> Launch:
        """Return the launch that merges the block into the running out (B, H, Tq, Dv) and lse (B, H, Tq), fp32;
        `first`: both are uninitialised."""
        config = self._config("forward", self.k, self.v)
        table = self._table(self.geometry, self.documents, config, idle=first)
        arguments = {
            "q": self.q, "k": self.k, "v": self.v, "k_tiles": _tiles(self.k, config), "v_tiles": _tiles(self.v, config),
            "out": out, "lse": lse, **self._data(table),
            **_strides("q", self.q), **_strides("k", self.k), **_strides("v", self.v), **_strides("o", out),
            "lb": lse.stride(0), "lh": lse.stride(1), "head_count": self.q.shape[1], **self._numbers(table, self.k),
            **self._shape(config), "FIRST": first, "POSITIVE_SCALE": self.scores.scale > 0,
        }  # fmt: skip
        return self._launch(forward_kernel, table, self.q.shape[1], arguments, config)

    def queries(self, rows: Prepared, dq: torch.Tensor, first: bool) -> tuple[Launch, torch.Tensor | None]:
        """Return the launch that adds to dq (B, H, Tq, Dk), fp32 (writes it if `first`), and the tensor (B, H, tiles)
        that gets the parts of sum(dS * |i - j|), None without ALiBi."""
        config = self._config("queries", self.k, self.v)
        table = self._table(self.geometry, self.documents, config, idle=first)
        dslopes = None
        if self.scores.alibi is not None:
            dslopes = torch.empty((*dq.shape[:2], table.tiles), dtype=torch.float32, device=dq.device)
        arguments = {
            "q": self.q, "k": self.k, "v": self.v, "k_tiles": _tiles(self.k, config), "v_tiles": _tiles(self.v, config),
            "dout": rows.dout, "lse2": rows.lse2, "delta": rows.delta,
            "dq": dq, "dslopes": dslopes, **self._data(table),
            **_strides("q", self.q), **_strides("k", self.k), **_strides("v", self.v), **_strides("do", rows.dout),
            **_strides("dq", dq), "head_count": self.q.shape[1], **self._numbers(table, self.k),
            "grad_scale": float(self.scores.scale), **self._shape(config), "FIRST": first,
        }  # fmt: skip
        return self._launch(queries_kernel, table, self.q.shape[1], arguments, config), dslopes

    def keys(self, rows: Prepared, dk: torch.Tensor, dv: torch.Tensor) -> Launch:
        """Return the launch that writes dk and dv, shaped as k and v, fp32."""
        config = self._config("keys", self.q, rows.dout)
        swapped = None if self.documents is None else self.documents[::-1]
        table = self._table(self.geometry.swapped(), swapped, config, idle=True)
        arguments = {
            "q": self.q, "k": self.k, "v": self.v, "dout": rows.dout, "q_tiles": _tiles(self.q, config),
            "dout_tiles": _tiles(rows.dout, config), "lse2": rows.lse2, "delta": rows.delta,
            "dk": dk, "dv": dv, **self._data(table),
            **_strides("q", self.q), **_strides("k", self.k), **_strides("v", self.v), **_strides("do", rows.dout),
            **_strides("dk", dk), **_strides("dv", dv), "kv_head_count": self.k.shape[1],
            **self._numbers(table, self.k), "grad_scale": float(self.scores.scale), **self._shape(config),
        }  # fmt: skip
        return self._launch(keys_kernel, table, self.k.shape[1], arguments, config)

    def _config(self, name: str, *walked: torch.Tensor) -> tiles.Config:
        """Return the configuration of a pass that loops over the `walked` tensors; the portable one if a descriptor
        cannot describe them."""
        width = max(self.q.shape[-1], self.v.shape[-1])
        asked = name, width, self.q.dtype.itemsize, self._extras, self.arch
        config = self.choose(*asked)
        return config if not config.described or all(map(describable, walked)) else tiles.choose(*asked)

    @property
    def _extras(self) -> bool:
        return self.scores.softcap is not None or self.scores.alibi is not None or self.scores.dropout_p > 0

    def _table(self, geometry: Geometry, documents: Documents, config: tiles.Config, idle: bool) -> Table:
        table = index_table(geometry, config.tile, config.step, self.q.device, idle)
        return table if documents is None else narrow(table, geometry, *documents, config.tile, config.step)

    def _data(self, table: Table) -> dict[str, Any]:
        q_ids, k_ids = self.documents or (None, None)
        return {
            "headers": table.headers, "ranges": table.ranges, "q_documents": q_ids, "k_documents": k_ids,
            "slopes": self.scores.alibi, "seeds": self.scores.seeds if self.scores.dropout_p else None,
        }  # fmt: skip

    def _numbers(self, table: Table, k: torch.Tensor) -> dict[str, Any]:
        scores = self.scores
        cap = scores.softcap or 0.0
        threshold = min(round(scores.dropout_p * 2**32), 2**32 - 1)
        return {
            "range_batch": table.ranges.stride(0) if table.ranges.dim() == 4 else 0,
            "q_length": self.q.shape[2], "k_length": k.shape[2], "group": self.q.shape[1] // k.shape[1],
            "spans": table.ranges.shape[-2], "stride": self.geometry.stride,
            "scale": scores.scale / cap if cap else scores.scale * LOG2E, "cap": cap * LOG2E,
            "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,  # its bits, as a signed number
            "keep_scale": 1.0 / (1.0 - scores.dropout_p),
        }  # fmt: skip

    def _shape(self, config: tiles.Config) -> dict[str, Any]:
        d_k, d_v = self.q.shape[-1], self.v.shape[-1]
        return {
            "ROWS": config.tile, "COLS": config.step, "DK": d_k, "DV": d_v, "WK": padded(d_k), "WV": padded(d_v),
            "DOCUMENTS": self.documents is not None, "SOFTCAP": self.scores.softcap is not None,
            "ALIBI": self.scores.alibi is not None, "DROPOUT": self.scores.dropout_p > 0,
            "DESCRIBED": config.described,
        }  # fmt: skip

    def _launch(self, kernel: Any, table: Table, heads: int, arguments: dict[str, Any], config: tiles.Config) -> Launch:
        return Launch(kernel, (table.tiles, self.q.shape[0] * heads), arguments, config.warps, config.stages)


def prepare(
    q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None
) -> tuple[Launch, Prepared]:
    """Return the launch that computes Prepared, and Prepared. out, dout (B, H, T, Dv); lse, dlse (B, H, T)."""
    delta, lse2 = (torch.empty(lse.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    (batch, heads, length), d_v = lse.shape, out.shape[-1]
    tile = 64
    arguments = {
        "out": out, "dout": dout, "lse": lse, "dlse": dlse, "delta": delta, "lse2": lse2,
        **_strides("o", out), **_strides("do", dout), "lb": lse.stride(0), "lh": lse.stride(1),
        "dlb": 0 if dlse is None else dlse.stride(0), "dlh": 0 if dlse is None else dlse.stride(1),
        "head_count": heads, "length": length, "ROWS": tile, "DV": d_v, "WV": padded(d_v), "DLSE": dlse is not None,
    }  # fmt: skip
    return Launch(preprocess_kernel, (-(-length // tile), batch * heads), arguments), Prepared(q, dout, lse2, delta)


def describable(x: torch.Tensor) -> bool:
    """Return whether a descriptor can describe x (B, heads, T, D): the copy engine needs addresses aligned to 16
    bytes."""
    apart = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    on_meta = x.device.type == "meta"
    begin = 0 if on_meta else x.data_ptr()
    return begin % 16 == 0 and x.stride(3) == 1 and all(s > 0 and s * x.itemsize % 16 == 0 for s in apart)


def _tiles(x: torch.Tensor, config: tiles.Config) -> TensorDescriptor | None:
    """Return a descriptor of x (B, heads, T, D) with tiles of (step, padded D) of one head; None if unused."""
    if not config.described:
        return None
    width, sizes = padded(x.shape[3]), list(x.shape)
    dense = sizes[3] * 16  # a dimension of size 1 may have any stride, but it is checked
    strides = [dense if size == 1 else stride for size, stride in zip(sizes[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, sizes, [*strides, 1], [1, 1, config.step, width])


def padded(dim: int) -> int:
    """Return the power of two, at least 16, to which kernels pad a head dimension."""
    return max(16, triton.next_power_of_2(dim))


def _strides(name: str, x: torch.Tensor) -> dict[str, int]:
    """Return batch, head and token strides; the last dimension is dense."""
    return {f"{name}{axis}": x.stride(dim) for axis, dim in zip("bht", range(3), strict=True)}

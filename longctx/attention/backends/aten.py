"""torch's fused CPU flash attention, one call per tile: the fast CPU backend.

`aten::_scaled_dot_product_flash_attention_for_cpu` and its backward return and accept (out, lse), as a ring needs.
This file alone works around its limits:

- a row of a masked tile that sees no key reports lse 0: set to -inf from the mask;
- a final lse of -inf makes the whole backward NaN: such rows pass +inf, so their probabilities are exp(-inf) = 0;
- d_v != d_k is rejected: the narrower side is padded with zeros;
- a last dimension with a stride is read wrongly, without an error: such tensors are copied; no tile is empty, which
  would divide by zero;
- its backward has no gradient of the lse: dS = P * (dO V^T - delta + dlse), so dlse becomes an additional column of dO,
  with a column of ones in V;
- is_causal is aligned top-left, as TRIANGLE tiles are;
- is_causal masks with -inf before it applies the scale, so a scale of 0 or below yields NaN: the sign moves into q.

Heads are computed a few at a time, so that the operator's results for a tile add little to the peak of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from longctx.attention.backends.base import BackwardQueries, KeyBlock, StepGradients, accumulator_dtype
from longctx.attention.band import TILE, Kind, Tile
from longctx.attention.mask import BlockMask
from longctx.attention.merge import merge_
from longctx.attention.tiles import plan

MIN_WORK = 1 << 22
"""The (query, key, head) triples that a call should have at least, so that its overhead (some 50 us) is below 1 %."""
FP32_BACKWARD_SIDE = 512
"""Half-precision tiles with a side up to this run backward in fp32: in half precision it is many times slower."""


class Heads(NamedTuple):
    """The query heads and the key heads of one call."""

    q: slice
    k: slice
    first: bool
    """The first call with these key heads."""


class AtenBackend:
    """The fused CPU operator as a Backend: fp64, fp32, bf16 and fp16 (each tile's result is rounded to the dtype). It
    has no softcap, no dropout and no gradient of a bias, so scores must be plain."""

    name = "aten"

    def forward_step(self, q: torch.Tensor, block: KeyBlock, out: torch.Tensor, lse: torch.Tensor, first: bool) -> None:
        k, v = block.k, block.v
        width, written = max(q.shape[-1], v.shape[-1]), Written(q.shape[0], q.shape[2], (out, 0.0), (lse, -torch.inf))
        scale, sign = _positive(block.scores.scale)
        q = q if sign == 1 else q * sign
        if not first:
            written.all()
        for batch, tile, bias, blind in _calls(block.mask, q):
            rows, cols = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            new = written.first_write(batch, tile.q0, tile.q1)
            for heads in _head_groups(q[batch], k, tile):
                part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    _pad(q[batch, heads.q, rows], width),
                    _pad(_shared(k[batch, heads.k, cols], heads), width),
                    _pad(_shared(v[batch, heads.k, cols], heads), width),
                    is_causal=tile.kind == Kind.TRIANGLE,
                    attn_mask=None if bias is None else bias.to(q.dtype),
                    scale=scale,
                )
                if blind is not None:
                    part_lse = part_lse.masked_fill(blind, -torch.inf)
                part, at = part[..., : v.shape[-1]], (batch, heads.q, rows)
                if new:
                    out[at], lse[at] = part, part_lse
                else:
                    merge_(out[at], lse[at], part, part_lse)
                del part, part_lse  # before the next call allocates its own
        written.finish()

    def prepare_backward(self, queries: BackwardQueries) -> BackwardQueries:
        lse = queries.lse.masked_fill(queries.lse == -torch.inf, torch.inf)
        return replace(queries, q=_dense(queries.q), out=_dense(queries.out), dout=_dense(queries.dout), lse=lse)

    def backward_step(self, prepared: BackwardQueries, block: KeyBlock, gradients: StepGradients, first: bool) -> None:
        (batches, _, q_len, d_k), k, v, (dq, dk, dv, _) = prepared.q.shape, block.k, block.v, gradients
        queries_written = Written(batches, q_len, (dq, 0.0))
        keys_written = Written(batches, k.shape[2], (dk, 0.0), (dv, 0.0))
        if not first:
            queries_written.all()
        scale, sign = _positive(block.scores.scale)
        signed = prepared if sign == 1 else replace(prepared, q=prepared.q * sign)
        for batch, tile, bias, _ in _calls(block.mask, prepared.q):
            new_q = queries_written.first_write(batch, tile.q0, tile.q1)
            new_k = keys_written.first_write(batch, tile.k0, tile.k1)
            for heads in _head_groups(prepared.q[batch], k, tile):
                at, keys = (batch, heads.q, slice(tile.q0, tile.q1)), (batch, heads.k, slice(tile.k0, tile.k1))
                part_dq, part_dk, part_dv = _backward(signed, k[keys], v[keys], at, heads, tile, bias, scale)
                _put(dq[at], part_dq[..., :d_k] if sign == 1 else part_dq[..., :d_k] * sign, new_q)
                new_head = new_k and heads.first
                _put(dk[keys], _summed(part_dk[..., :d_k], heads, dk.dtype), new_head)
                _put(dv[keys], _summed(part_dv[..., : v.shape[-1]], heads, dv.dtype), new_head)
                del part_dq, part_dk, part_dv  # before the next call allocates its own
        queries_written.finish()
        keys_written.finish()


def _backward(
    queries: BackwardQueries,
    k: torch.Tensor,
    v: torch.Tensor,
    at: tuple[slice, slice, slice],
    heads: Heads,
    tile: Tile,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dq, dk, dv) of one call, padded to one width, dk and dv per query head.

    Args:
        k, v: the tile's keys and values of the call's key heads.
        at: the call's (batch rows, query heads, queries), an index into the tensors of `queries`.
        bias: additive mask of the tile, or None.
    """
    q, dlse, values, dout = queries.q, queries.dlse, v, queries.dout[at]
    # With dlse always in fp32: half precision would round the column that holds it.
    fine = dlse is not None or min(tile.q1 - tile.q0, tile.k1 - tile.k0) <= FP32_BACKWARD_SIDE
    dtype = torch.float32 if fine and q.dtype.itemsize == 2 else q.dtype
    values, dout = values.to(dtype), dout.to(dtype)
    if dlse is not None:  # an additional column: dO V^T gains dlse * 1
        values = F.pad(values, (0, 1), value=1.0)
        dout = torch.cat([dout, dlse[at][..., None].to(dtype)], -1)
    width = max(k.shape[-1], values.shape[-1])
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _pad(dout, width),
        _pad(q[at].to(dtype), width),
        _pad(_shared(k.to(dtype), heads), width),
        _pad(_shared(values, heads), width),
        _pad(queries.out[at].to(dtype), width),
        queries.lse[at],
        0.0,
        tile.kind == Kind.TRIANGLE,
        attn_mask=None if bias is None else bias.to(dtype),
        scale=scale,
    )
    return dq, dk, dv


def _positive(scale: float) -> tuple[float, float]:
    """Return (a scale above 0, a factor of q) whose product is `scale`."""
    if scale > 0:
        return scale, 1.0
    return (-scale, -1.0) if scale < 0 else (1.0, 0.0)


def _calls(mask: BlockMask, q: torch.Tensor) -> Iterator[tuple[slice, Tile, torch.Tensor | None, torch.Tensor | None]]:
    """Yield (batch slice, tile, additive mask or None, mask of the rows that see nothing in the tile or None)."""
    for batch, tiles in plan(mask, q.shape[0]):
        row = mask.row(batch.start)
        for tile in tiles:
            allowed = row.tile(*tile[1:]) if tile.kind == Kind.DENSE else True
            if allowed is False:
                continue
            if allowed is True:
                yield batch, tile, None, None
                continue
            assert isinstance(allowed, torch.Tensor)
            seen = allowed.any(-1)
            bias = torch.zeros(allowed.shape, dtype=accumulator_dtype(q.dtype)).masked_fill_(~allowed, -torch.inf)
            yield batch, tile, bias, None if bool(seen.all()) else ~seen


def _head_groups(q: torch.Tensor, k: torch.Tensor, tile: Tile) -> Iterator[Heads]:
    """Split the heads of a tile into calls that have enough work each and results much smaller than the tensor."""
    rows, cols, heads, kv_heads = tile.q1 - tile.q0, tile.k1 - tile.k0, q.shape[1], k.shape[1]
    batch, shared = q.shape[0], heads // kv_heads
    want = max(-(-MIN_WORK // (batch * rows * cols)), -(-torch.get_num_threads() // batch))
    if shared == 1 or (want >= heads and cols <= 2 * TILE):  # the second: small enough to repeat keys in memory
        step = min(want, heads)
        for first in range(0, heads, step):
            last = min(first + step, heads)
            yield Heads(slice(first, last), slice(first // shared, -(-last // shared)), True)
        return
    step = min(want, shared)
    for kv in range(kv_heads):
        for first in range(kv * shared, (kv + 1) * shared, step):
            yield Heads(slice(first, min(first + step, (kv + 1) * shared)), slice(kv, kv + 1), first == kv * shared)


class Written:
    """Which rows of an accumulator are initialised: the first tile on a row is copied, later ones are added.

    This saves writing zeros to a whole tensor and reading them back. A watermark per batch row suffices: tiles come
    mostly in order of rows, and rows that a tile skips are filled with the initial value.
    """

    def __init__(self, batch: int, size: int, *targets: tuple[torch.Tensor, float]) -> None:
        self._marks, self._size, self._targets = [0] * batch, size, targets

    def all(self) -> None:
        """Mark every row as initialised."""
        self._marks = [self._size] * len(self._marks)

    def first_write(self, batch: slice, begin: int, end: int) -> bool:
        """Return whether rows [begin, end) are new; the caller then overwrites all of them."""
        mark = self._marks[batch.start]
        new = begin >= mark
        self._fill(batch, mark, begin if new else end)
        self._marks[batch] = [max(mark, end)] * (batch.stop - batch.start)
        return new

    def finish(self) -> None:
        """Fill the rows that no tile has written."""
        for index, mark in enumerate(self._marks):
            self._fill(slice(index, index + 1), mark, self._size)

    def _fill(self, batch: slice, begin: int, end: int) -> None:
        if begin < end:
            for target, value in self._targets:
                target[batch, :, begin:end] = value


def _put(target: torch.Tensor, value: torch.Tensor, new: bool) -> None:
    if new:
        target.copy_(value)
    else:
        target += value


def _shared(x: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Return one key head per query head: a view with stride 0, or copies for small tiles of several key heads."""
    shared = (heads.q.stop - heads.q.start) // x.shape[1]
    if shared == 1:
        return x
    return x.expand(-1, shared, -1, -1) if x.shape[1] == 1 else x.repeat_interleave(shared, 1)


def _summed(x: torch.Tensor, heads: Heads, dtype: torch.dtype) -> torch.Tensor:
    """Sum the query heads that share a key head: the backward of `_shared`."""
    kv_heads = heads.k.stop - heads.k.start
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2, dtype=dtype)


def _pad(x: torch.Tensor, width: int) -> torch.Tensor:
    return _dense(x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])))


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()

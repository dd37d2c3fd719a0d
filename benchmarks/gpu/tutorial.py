"""A baseline: flash attention in the style of Triton's tutorial, our own code and kept plain.

One block of queries per program, keys in a loop, a causal mask on the diagonal, dK and dV per query head. No ring, no
running state, no documents: it measures what our kernels' generality costs or gains. Lengths must be multiples of 128,
head dimensions powers of two.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

TILE_M, TILE_N = 128, 64


@triton.jit
def _rows(x, begin, count: tl.constexpr, dim: tl.constexpr):
    return x + (begin + tl.arange(0, count))[:, None] * dim + tl.arange(0, dim)[None, :]


@triton.jit
def _forward(q, k, v, out, lse, length, group, scale, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
             CAUSAL: tl.constexpr):  # fmt: skip
    begin, head = tl.program_id(0) * M, tl.program_id(1).to(tl.int64)
    own, shared = head * length * D, head // group * length * D
    query = tl.load(_rows(q + own, begin, M, D))
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    end = begin + M if CAUSAL else length
    for first in range(0, end, N):
        key = tl.load(_rows(k + shared, first, N, D))
        scores = tl.dot(query, tl.trans(key)) * (scale * 1.4426950408889634)
        if CAUSAL:
            scores = tl.where(
                begin + tl.arange(0, M)[:, None] >= first + tl.arange(0, N)[None, :], scores, float("-inf")
            )
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype.element_ty), tl.load(_rows(v + shared, first, N, D)), acc * fade[:, None])
        top = new_top
    tl.store(_rows(out + own, begin, M, D), (acc / total[:, None]).to(out.dtype.element_ty))
    tl.store(lse + head * length + begin + tl.arange(0, M), top + tl.log2(total))


@triton.jit
def _dkdv(q, k, v, dout, lse, delta, dk, dv, length, group, scale, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
          CAUSAL: tl.constexpr):  # fmt: skip
    begin, head = tl.program_id(0) * N, tl.program_id(1).to(tl.int64)
    own, shared = head * length * D, head // group * length * D
    key, value = tl.load(_rows(k + shared, begin, N, D)), tl.load(_rows(v + shared, begin, N, D))
    dk_acc, dv_acc = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    for first in range(begin // M * M if CAUSAL else 0, length, M):
        query, do = tl.load(_rows(q + own, first, M, D)), tl.load(_rows(dout + own, first, M, D))
        rows = head * length + first + tl.arange(0, M)
        p = tl.exp2(tl.dot(key, tl.trans(query)) * (scale * 1.4426950408889634) - tl.load(lse + rows)[None, :])
        if CAUSAL:
            p = tl.where(first + tl.arange(0, M)[None, :] >= begin + tl.arange(0, N)[:, None], p, 0.0)
        dv_acc = tl.dot(p.to(do.dtype), do, dv_acc)
        ds = p * (tl.dot(value, tl.trans(do)) - tl.load(delta + rows)[None, :])
        dk_acc = tl.dot(ds.to(query.dtype), query, dk_acc)
    tl.store(_rows(dk + own, begin, N, D), (dk_acc * scale).to(dk.dtype.element_ty))
    tl.store(_rows(dv + own, begin, N, D), dv_acc.to(dv.dtype.element_ty))


@triton.jit
def _dq(q, k, v, dout, lse, delta, dq, length, group, scale, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
        CAUSAL: tl.constexpr):  # fmt: skip
    begin, head = tl.program_id(0) * M, tl.program_id(1).to(tl.int64)
    own, shared = head * length * D, head // group * length * D
    query, do = tl.load(_rows(q + own, begin, M, D)), tl.load(_rows(dout + own, begin, M, D))
    rows = head * length + begin + tl.arange(0, M)
    own_lse, own_delta = tl.load(lse + rows), tl.load(delta + rows)
    acc = tl.zeros([M, D], tl.float32)
    end = begin + M if CAUSAL else length
    for first in range(0, end, N):
        key = tl.load(_rows(k + shared, first, N, D))
        p = tl.exp2(tl.dot(query, tl.trans(key)) * (scale * 1.4426950408889634) - own_lse[:, None])
        if CAUSAL:
            p = tl.where(begin + tl.arange(0, M)[:, None] >= first + tl.arange(0, N)[None, :], p, 0.0)
        dp = tl.dot(do, tl.trans(tl.load(_rows(v + shared, first, N, D))))
        acc = tl.dot((p * (dp - own_delta[:, None])).to(key.dtype), key, acc)
    tl.store(_rows(dq + own, begin, M, D), (acc * scale).to(dq.dtype.element_ty))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal):
        batch, heads, length, dim = q.shape
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        ctx.causal, ctx.scale, ctx.group = causal, 1.0 / math.sqrt(dim), heads // k.shape[1]
        _forward[(length // TILE_M, batch * heads)](
            q, k, v, out, lse, length, ctx.group, ctx.scale, TILE_M, TILE_N, dim, causal,
            num_warps=8 if dim > 64 else 4, num_stages=2 if dim > 128 else 3,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        batch, heads, length, dim = q.shape
        dout, delta = dout.contiguous(), (out.float() * dout).sum(-1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
        tile = 64 if dim <= 128 else 32
        arguments = (length, ctx.group, ctx.scale, tile, tile, dim, ctx.causal)
        options = {"num_warps": 4 if dim <= 64 else 8, "num_stages": 2}
        grid = (length // tile, batch * heads)
        _dkdv[grid](q, k, v, dout, lse, delta, dk, dv, *arguments, **options)
        _dq[grid](q, k, v, dout, lse, delta, dq, *arguments, **options)
        dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) if ctx.group > 1 else x for x in (dk, dv))
        return dq, dk, dv, None


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """q (B, H, T, D); k, v (B, G, T, D), all contiguous; differentiable."""
    return _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), causal)

"""The decode kernels as one operator of torch.library: forward only, since generation needs no gradient.

Importing this file registers the operator; triton is imported when it first runs.
"""

from __future__ import annotations

import torch

from longctx.kernels.decode.terms import Terms


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    value_width: int,
    heads: int,
    tokens: int,
    terms: Terms,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels/decode/reference.py's `decode` on the kernels: out (B, G, rows, Dv) and lse (B, G, rows), fp32.

    Args:
        splits: parts of the context that are read at the same time; None chooses by the shape and the chip.
    """
    t = terms
    return _forward(
        q, k, v, value_width, heads, tokens, t.scale, t.softcap, t.constant, t.factor, t.shift, t.slopes, t.bias,
        t.mask, t.lengths, t.causal, t.offset, splits,
    )  # fmt: skip


@torch.library.custom_op("longctx::decode_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    value_width: int,
    heads: int,
    tokens: int,
    scale: float,
    softcap: float | None,
    constant: torch.Tensor | None,
    factor: torch.Tensor | None,
    shift: torch.Tensor | None,
    slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    causal: bool,
    offset: int,
    splits: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from longctx.attention.backends.triton import arch, dense, on_device
    from longctx.kernels.decode.fused import Call

    constant, shift, slopes = (None if x is None else x.float().contiguous() for x in (constant, shift, slopes))
    terms = Terms(scale, softcap, constant, factor, shift, slopes, bias, mask, lengths, causal, offset)
    values = None if v is None else dense(v)
    call = Call(q.contiguous(), dense(k), values, value_width, heads, tokens, terms, arch(q.device), splits)
    out, lse = _results(q, value_width)
    with on_device(q.device):
        for launch in call.launches(out, lse):
            launch()
    return out, lse


@_forward.register_fake
def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, value_width: int, *rest: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(q, value_width)


def _results(q: torch.Tensor, value_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty((*q.shape[:3], value_width), dtype=torch.float32, device=q.device),
        torch.empty(q.shape[:3], dtype=torch.float32, device=q.device),
    )

"""The decode kernels as one operator of torch.library: forward only, since generation needs no gradient.

Importing this file registers the operator; triton is imported at its first call.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.operator_common import schema_of
from longctx.kernels.decode.terms import Operands, Terms


def decode(operands: Operands, terms: Terms, splits: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `decode` of kernels/decode/reference.py with the kernels: out (B, G, rows, Dv), lse (B, G, rows), fp32.

    Args:
        splits: parts of the context that are read in parallel; None chooses by the shape and the chip.
    """
    return _forward(*operands, *terms, splits)


_SCHEMA = f"({schema_of(Operands, Terms, integer='SymInt')}, SymInt? splits) -> (Tensor, Tensor)"


@torch.library.custom_op("longctx::decode_attention", mutates_args=(), schema=_SCHEMA)
def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from longctx.attention.backends.triton import arch, dense, on_device
    from longctx.kernels.decode.fused import Call

    operands, terms, splits = _unflatten(*arguments)
    q, k, v = operands[:3]
    operands = operands._replace(q=q.contiguous(), k=dense(k), v=None if v is None else dense(v))
    terms = terms._replace(
        constant=_dense_fp32(terms.constant), shift=_dense_fp32(terms.shift), slopes=_dense_fp32(terms.slopes)
    )
    out, lse = _results(operands)
    with on_device(q.device):
        for launch in Call(operands, terms, arch(q.device), splits).launches(out, lse):
            launch.run()
    return out, lse


@_forward.register_fake
def _fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(_unflatten(*arguments)[0])


def _unflatten(*arguments: Any) -> tuple[Operands, Terms, int | None]:
    """Return the operator's flat arguments by name."""
    count = len(Operands._fields)
    return Operands(*arguments[:count]), Terms(*arguments[count:-1]), arguments[-1]


def _dense_fp32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float().contiguous()


def _results(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) without values."""
    q = operands.q
    out = torch.empty((*q.shape[:3], operands.value_width), dtype=torch.float32, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)

"""The decode kernels' rows for kernel_aot_others.py: what is launched and with which tiles.

Up to a width of 256, each of 8 key heads has separate keys and values for 16 queries, or 64 in kind "extras", so that
both heights of a tile are compiled. Beyond that, 64 queries (heads x beams) share keys that are also the values; of the
576 columns of DeepSeek's latent, the first 512 are.
"""

from __future__ import annotations

from typing import Any

KEYS, HEADS = 65536, 16


def widths(width: int) -> tuple[int, int, bool]:
    """(Dk, Dv, whether values are columns of the keys)."""
    return width, 512 if width == 576 else width, width > 256


def config(case: Any) -> tuple[Any, ...]:
    from longctx.kernels.decode import tiles

    key_width, value_width, shared = widths(case.width)
    itemsize = 4 if case.kind == "float" else 2
    return tuple(
        tiles.choose(_beams(case) * HEADS, key_width, value_width, shared, itemsize, case.kind == "extras", case.arch)
    )


def _beams(case: Any) -> int:
    """Return the number of beams: the queries of each head that reads the same keys."""
    return 1 if case.width <= 256 and case.kind != "extras" else 4


def launch(case: Any) -> Any:
    """Return the launch of a pass, on torch's meta device; kind "extras": with all terms of a logit."""
    import torch

    from longctx.kernels.decode.fused import Call, merge
    from longctx.kernels.decode.terms import Operands, Terms

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    key_width, value_width, shared = widths(case.width)
    batch, splits, groups, beams, heads = 2, 16, 1 if shared else 8, _beams(case), HEADS
    rows, dtype = beams * heads, torch.float32 if case.kind == "float" else torch.bfloat16
    parts, lse = empty(batch, groups, splits, rows, value_width), empty(batch, groups, splits, rows)
    if case.name == "merge":
        return merge(parts, lse, empty(batch, groups, rows, value_width), empty(batch, groups, rows))
    terms = Terms(0.1)
    if case.kind == "extras":
        per_row, pairs = empty(batch, groups, rows), (batch, groups, beams, heads, 1, KEYS)
        terms = Terms(
            0.1, 30.0, per_row, empty(batch, groups, heads, KEYS), per_row, empty(groups, heads), empty(*pairs),
            empty(batch, 1, 1, 1, 1, KEYS, dtype=torch.bool).expand(pairs), empty(batch, dtype=torch.int32), True,
            KEYS - 1,
        )  # fmt: skip
    q, k = empty(batch, groups, rows, key_width, dtype=dtype), empty(batch, groups, KEYS, key_width, dtype=dtype)
    v = None if shared else empty(batch, groups, KEYS, value_width, dtype=dtype)
    call = Call(Operands(q, k, v, value_width, heads, 1), terms, case.arch, splits)
    return call.partial(parts, lse, *call.parts())

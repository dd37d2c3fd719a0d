"""Build the launches of a decode call: the attention of every split and, with several splits, their merge.

No launch waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton

from ..flash.launch import Launch
from . import tiles
from .merge import merge_kernel
from .partial import partial_kernel
from .terms import Operands, Terms

Optional = torch.Tensor | None
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Call:
    """One call. q is dense; k and v have any strides with a dense last dimension; all are bf16, fp16 or fp32.

    splits: number of splits of the context; None chooses by the shape and the chip.
    """

    operands: Operands
    terms: Terms
    arch: str
    splits: int | None = None

    def launches(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[Launch, ...]:
        """Return the launches that write out (B, G, rows, Dv) and lse (B, G, rows), fp32, dense."""
        splits, span = self.parts()
        if splits == 1:
            return (self.partial(out, lse, 1, span),)
        batch, groups, rows, width = out.shape
        parts = out.new_empty(batch, groups, splits, rows, width)
        part_lse = lse.new_empty(batch, groups, splits, rows)
        return self.partial(parts, part_lse, splits, span), merge(parts, part_lse, out, lse)

    @property
    def config(self) -> tiles.Config:
        q, _, v, value_width, *_ = self.operands
        rows, width = q.shape[2:]
        return tiles.choose(rows, width, value_width, v is None, q.dtype.itemsize, self.terms.extras, self.arch)

    def parts(self) -> tuple[int, int]:
        """Return (number of splits, keys per split); a split consists of whole tiles."""
        config, keys, device = self.config, self.operands.k.shape[2], self.operands.q.device
        wanted = self.splits or tiles.splits(math.prod(self._grid()), keys, config.step, processors(device))
        span = max(1, -(-keys // wanted // config.step)) * config.step
        return max(1, -(-keys // span)), span

    def partial(self, out: torch.Tensor, lse: torch.Tensor, splits: int, span: int) -> Launch:
        """Return the launch that writes every split's out (B, G, splits, rows, Dv) and lse (B, G, splits, rows), fp32,
        dense."""
        config, terms = self.config, self.terms
        q, k, separate_v, value_width, heads, tokens = self.operands
        v = k if separate_v is None else separate_v
        (row_tiles, column_tiles, units), width = self._grid(), k.shape[3]
        cap = 1.0 if terms.softcap is None else terms.softcap
        arguments = {
            "q": q, "k": k, "v": v, "constant": terms.constant, "factor": terms.factor, "shift": terms.shift,
            "slopes": None if terms.slopes is None else terms.slopes * LOG2E, "bias": terms.bias,
            "mask": None if terms.mask is None else terms.mask.view(torch.uint8), "lengths": terms.lengths,
            "out": out, "lse": lse,
            **_strides("k", k, "bgs"), **_strides("v", v, "bgs"), **_strides("f", terms.factor, "bgns"),
            **_strides("b", terms.bias, "bgonts"), **_strides("m", terms.mask, "bgonts"),
            "groups": k.shape[1], "rows": q.shape[2], "heads": heads, "tokens": tokens,
            "keys": k.shape[2], "span": span, "row_tiles": row_tiles, "offset": terms.offset,
            "scale": terms.scale * LOG2E if terms.softcap is None else terms.scale / cap, "cap": cap * LOG2E,
            "ROWS": config.rows, "STEP": config.step, "WIDTH": config.width, "DK": width, "DV": value_width,
            "KEY_CHUNKS": -(-width // config.width), "VALUE_CHUNKS": config.values, "KEPT": config.kept,
            "UNROLLED": config.kept or width <= 256, "CONSTANT": terms.constant is not None,
            "FACTOR": terms.factor is not None, "SHIFT": terms.shift is not None, "SOFTCAP": terms.softcap is not None,
            "ALIBI": terms.slopes is not None, "BIAS": terms.bias is not None, "MASK": terms.mask is not None,
            "LENGTHS": terms.lengths is not None, "CAUSAL": terms.causal,
        }  # fmt: skip
        grid = (row_tiles * column_tiles, splits, units)
        return Launch(partial_kernel, grid, arguments, config.warps, config.stages)

    def _grid(self) -> tuple[int, int, int]:
        """Return (row tiles, column tiles, batch x key heads)."""
        config, (batch, groups, rows, _) = self.config, self.operands.q.shape
        columns = config.values * config.width  # that one program computes
        return -(-rows // config.rows), -(-self.operands.value_width // columns), batch * groups


def merge(parts: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Launch:
    """Return the launch that merges the splits' results."""
    batch, groups, splits, rows, width = parts.shape
    columns = min(tiles.MERGED, max(16, triton.next_power_of_2(width)))
    arguments = {
        "parts": parts, "part_lse": part_lse, "out": out, "lse": lse, "rows": rows, "splits": splits, "DV": width,
        "WIDTH": columns, "SPLITS": triton.next_power_of_2(splits),
    }  # fmt: skip
    return Launch(merge_kernel, (batch * groups * rows, -(-width // columns)), arguments, 4)


@cache
def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors or compute units; four in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _strides(name: str, x: Optional, axes: str) -> dict[str, int]:
    """Return the strides of all dimensions in `axes`; zeros for None."""
    numbers = (0,) * len(axes) if x is None else x.stride()
    return {f"{name}{axis}": n for axis, n in zip(axes, numbers, strict=False)}

"""The Triton backend: kernels/flash behind the Backend protocol. Any GPU that Triton knows, or its interpreter.

Here a BlockMask becomes the plain integers that the kernels' block tables are made of. Importing this file imports
triton, so only `choose.py` does, when the backend is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from longctx.attention.backends.base import KeyBlock, Rows, StepGradients
from longctx.attention.band import Rule, band, trim
from longctx.kernels.flash import fused
from longctx.kernels.flash.tables import Geometry, Side
from longctx.layout import Span


@dataclass(frozen=True)
class TritonBackend:
    """fp32, bf16, fp16; head dimensions up to 256. `choose` picks tile sizes (kernels/flash/tiles.py)."""

    choose: Callable[..., fused.tiles.Config] = fused.tiles.choose
    name: str = "triton"

    def forward_step(self, q: torch.Tensor, block: KeyBlock, out: torch.Tensor, lse: torch.Tensor, first: bool) -> None:
        with on_device(q.device):
            self._step(q, block).forward(out, lse, first)()

    def prepare_backward(self, rows: Rows) -> fused.Prepared:
        with on_device(rows.q.device):
            dlse = None if rows.dlse is None else dense(rows.dlse)
            launch, prepared = fused.prepare(dense(rows.q), dense(rows.out), dense(rows.lse), dense(rows.dout), dlse)
            launch()
        return prepared

    def backward_step(self, prepared: fused.Prepared, block: KeyBlock, gradients: StepGradients, first: bool) -> None:
        with on_device(prepared.q.device):
            step = self._step(prepared.q, block)
            launch, dslopes = step.queries(prepared, gradients.dq, first)
            launch()
            if gradients.dalibi is not None and dslopes is not None:
                gradients.dalibi.sub_(dslopes.sum((0, 2)))
            step.keys(prepared, gradients.dk, gradients.dv)()

    def _step(self, q: torch.Tensor, block: KeyBlock) -> fused.Step:
        mask, scores, documents = block.mask, block.scores, None
        if mask.q_documents is not None and mask.k_documents is not None:
            documents = mask.q_documents.contiguous(), mask.k_documents.contiguous()
        if scores.alibi is not None:
            scores = replace(scores, alibi=scores.alibi.float().contiguous())
        shape = geometry(mask.q_spans, mask.k_spans, mask.rule)
        q, k, v = (dense(x) for x in (q, block.k, block.v))
        return fused.Step(q, k, v, shape, documents, scores, arch(q.device), self.choose)


HOPPER = TritonBackend(fused.tiles.choose_hopper, "triton-tma")
"""The same kernels, whole tiles read through sm_90's copy engine; what that path does not do, the portable one does."""


@lru_cache(maxsize=1024)
def geometry(q_spans: tuple[Span, ...], k_spans: tuple[Span, ...], rule: Rule) -> Geometry:
    """Queries as rows, keys as columns, as the block tables want them."""
    q_trimmed, k_trimmed = (tuple(trim(span, rule.length) for span in spans) for spans in (q_spans, k_spans))
    bands = tuple(tuple(band(q, k, rule) for k in k_trimmed) for q in q_trimmed)
    return Geometry(_sides(q_spans, q_trimmed), _sides(k_spans, k_trimmed), bands, q_spans[0].stride)


def _sides(spans: tuple[Span, ...], trimmed: tuple[Span, ...]) -> tuple[Side, ...]:
    sides, offset = [], 0
    for span, part in zip(spans, trimmed, strict=True):
        sides.append(Side(offset, span.count, part.count, span.start))
        offset += span.count
    return tuple(sides)


@cache
def arch(device: torch.device) -> str:
    """The chip as kernels/flash/tiles.py names it."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def dense(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension dense in memory, as kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()

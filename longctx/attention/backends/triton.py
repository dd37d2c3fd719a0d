"""The Triton backend: kernels/flash as a Backend, on any GPU that Triton supports or in its interpreter.

It turns a BlockMask into the integers from which the kernels' block tables are built. Importing this file imports
triton, so `choose.py` imports it only when the backend is used. `longctx/kernels/flash` is a link to `kernels/flash`,
where the kernels are (grep and find do not follow it); `fused.Step`'s methods return launches, and `run()` starts them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from longctx.attention.backends.base import BackwardQueries, KeyBlock, StepGradients
from longctx.attention.band import Rule, band, trim
from longctx.kernels.flash import fused
from longctx.kernels.flash.tables import Geometry, Side
from longctx.layout import Span


@dataclass(frozen=True)
class TritonBackend:
    """fp32, bf16, fp16; head dimensions up to 256. `choose` returns tile sizes (kernels/flash/tiles.py)."""

    choose: Callable[..., fused.tiles.Config] = fused.tiles.choose
    name: str = "triton"

    def forward_step(self, q: torch.Tensor, block: KeyBlock, out: torch.Tensor, lse: torch.Tensor, first: bool) -> None:
        with on_device(q.device):
            self._step(q, block).forward(out, lse, first).run()

    def prepare_backward(self, queries: BackwardQueries) -> fused.Prepared:
        with on_device(queries.q.device):
            dlse = None if queries.dlse is None else dense(queries.dlse)
            q, out, lse, dout = (dense(x) for x in (queries.q, queries.out, queries.lse, queries.dout))
            launch, prepared = fused.prepare(q, out, lse, dout, dlse)
            launch.run()
        return prepared

    def backward_step(self, prepared: fused.Prepared, block: KeyBlock, gradients: StepGradients, first: bool) -> None:
        with on_device(prepared.q.device):
            step = self._step(prepared.q, block)
            launch, dslopes = step.queries(prepared, gradients.dq, first)
            launch.run()
            if gradients.dalibi is not None and dslopes is not None:
                gradients.dalibi.sub_(dslopes.sum((0, 2)))
            step.keys(prepared, gradients.dk, gradients.dv).run()

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
"""The same kernels reading whole tiles through sm_90's copy engine; calls that it does not support use the portable
ones."""


@lru_cache(maxsize=1024)
def geometry(q_spans: tuple[Span, ...], k_spans: tuple[Span, ...], rule: Rule) -> Geometry:
    """Return the geometry of the block tables, with queries as rows and keys as columns."""
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
    """Return the chip's name in kernels/flash/tiles.py."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context with `device` as the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return x with its last dimension dense in memory, as kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()

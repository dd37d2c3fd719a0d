"""The implementations to measure: ours, ours as a ring in sequence, torch's, and the Triton tutorial's kernel.

Each takes a row and inputs and returns a function without arguments that computes attention, differentiable; or raises
NotMeasured with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.gpu.figures import OURS, need_gpu
from benchmarks.gpu.rows import Row
from benchmarks.peers import NotMeasured
from longctx import block_attention
from longctx.attention.backends.choose import choose_backend, pattern_of
from longctx.attention.band import make_rule
from longctx.attention.scores import Scores
from longctx.errors import AttentionError

Call = Callable[[], torch.Tensor]


class Inputs(NamedTuple):
    """q (B, H, T, D); k, v (B, G, T, D); documents (B, T) or None; dout as q."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    documents: torch.Tensor | None
    dout: torch.Tensor


def _ours(backend: str) -> Callable[[Row, Inputs], Call]:
    """block_attention on one of its backends; what that backend refuses is not measured."""

    def prepare(row: Row, x: Inputs) -> Call:
        pattern = pattern_of(make_rule(row.causal, row.window), x.documents)
        try:
            choose_backend(backend, x.q, x.v, Scores(1.0), pattern)
        except AttentionError as error:
            raise NotMeasured(str(error)) from None

        def call() -> torch.Tensor:
            return block_attention(
                x.q, x.k, x.v, causal=row.causal, window=row.window, document_ids=x.documents, backend=backend
            )[0]

        return call

    return prepare


def ours_as_ring(row: Row, x: Inputs) -> Call:
    if row.ring == 1:
        raise NotMeasured("the row is not a ring")
    from benchmarks.gpu.ring import attention  # imports triton

    return lambda: attention(row, x.q, x.k, x.v)


def _sdpa(backend: str) -> Callable[[Row, Inputs], Call]:
    def prepare(row: Row, x: Inputs) -> Call:
        if row.window is not None or row.documents > 1:
            raise NotMeasured("no window and no documents without a dense mask")
        need_gpu(x.q)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def call() -> torch.Tensor:
            with sdpa_kernel([getattr(SDPBackend, backend)]):
                return F.scaled_dot_product_attention(
                    x.q, x.k, x.v, is_causal=row.causal, enable_gqa=x.k.shape[1] != x.q.shape[1]
                )

        return call

    return prepare


def flex(row: Row, x: Inputs) -> Call:
    need_gpu(x.q)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    fresh_compiler()

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        allowed = i >= j if row.causal else i >= 0
        if row.window is not None:
            allowed = allowed & (i - j < row.window)
        if x.documents is not None:
            allowed = allowed & (x.documents[b, i] == x.documents[b, j])
        return allowed

    plain = not row.causal and row.window is None and x.documents is None
    batch = row.batch if x.documents is not None else None
    mask = (
        None
        if plain
        else create_block_mask(visible, batch, None, row.length, row.length, device=x.q.device, _compile=True)
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(x.q, x.k, x.v, block_mask=mask, enable_gqa=x.k.shape[1] != x.q.shape[1])


def fresh_compiler() -> None:
    """Reset torch.compile: a function of more than eight shapes runs unfused, and would be measured so.

    Code that reaches that limit all the same raises an error.
    """
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def tutorial(row: Row, x: Inputs) -> Call:
    if row.window is not None or row.documents > 1:
        raise NotMeasured("no window and no documents")
    if row.length % 128:
        raise NotMeasured("lengths are multiples of 128")
    from benchmarks.gpu.tutorial import attention  # imports triton

    return lambda: attention(x.q, x.k, x.v, row.causal)


TMA, RING = "longctx, TMA", "longctx, ring in sequence"
BACKENDS = {OURS: "triton", TMA: "triton-tma", "longctx over cuDNN": "cudnn", "longctx over flash": "flash"}
"""What backend="auto" may choose between: `python -m benchmarks.gpu.table` builds its table from their rows."""
CONTESTANTS: dict[str, Callable[[Row, Inputs], Call]] = {
    **{name: _ours(backend) for name, backend in BACKENDS.items()},
    RING: ours_as_ring,
    "SDPA cuDNN": _sdpa("CUDNN_ATTENTION"),
    "SDPA flash": _sdpa("FLASH_ATTENTION"),
    "FlexAttention": flex,
    "tutorial": tutorial,
}

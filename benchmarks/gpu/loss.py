"""The loss's rows of `python -m benchmarks.gpu.run`: forward and backward from hidden states, time and memory.

Beside the fused kernel: the same tiles by torch's operators, Liger's fused linear cross entropy, and all logits at
once. Gradients of hidden states and head are checked against fp64 at fewer tokens first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu import figures, measure
from benchmarks.gpu.figures import OURS, Figure, Run, Table, need_gpu
from benchmarks.measure import relative_error
from benchmarks.peers import NotMeasured
from longctx.nn.loss import tiled_loss


@dataclass(frozen=True)
class Row:
    """Tokens, hidden size and vocabulary of a loss."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"loss-{self.tokens}-d{self.hidden}-v{self.vocabulary}"


ROWS = (Row(16_384, 4096, 128_256), Row(65_536, 4096, 128_256), Row(16_384, 2048, 32_000))
TINY = (Row(40, 8, 50, "float32"),)
"""For the interpreter."""
CHECKED = 512
"""Tokens whose gradients are checked."""


@dataclass
class Inputs:
    """hidden (T, D) and weight (V, D), which require gradients; labels (T,), a tenth of them ignored."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def make_inputs(row: Row, device: torch.device) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, row.dtype)
    hidden, weight = (torch.randn(n, row.hidden, generator=g, device=device) for n in (row.tokens, row.vocabulary))
    labels = torch.randint(0, row.vocabulary, (row.tokens,), generator=g, device=device)
    labels[::10] = -100
    weight = weight / row.hidden**0.5
    return Inputs(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels)


def _ours(backend: str) -> Callable[[Inputs], torch.Tensor]:
    def loss(x: Inputs) -> torch.Tensor:
        return tiled_loss(x.hidden, x.weight, x.labels, backend=backend)  # type: ignore[arg-type]

    return loss


def _liger(x: Inputs) -> torch.Tensor:
    """Liger, with the weight's gradient summed in fp32, as in ours."""
    need_gpu(x.hidden)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise NotMeasured("liger-kernel is not installed") from error
    loss: torch.Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(
        x.weight, x.hidden, x.labels
    )
    return loss


def _whole(x: Inputs) -> torch.Tensor:
    logits = F.linear(x.hidden, x.weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), x.labels, reduction="sum")


CONTESTANTS: dict[str, Callable[[Inputs], torch.Tensor]] = {
    OURS: _ours("triton"), "longctx, torch": _ours("torch"), "Liger": _liger, "all logits": _whole,
}  # fmt: skip


def run(this: Run) -> list[str]:
    """Measure every wanted row, append its figures to loss_gpu.csv, return what is wrong."""
    results, measured = this.results("loss", ("ms", "peak_bytes")), partial(_measure, this.device)
    table = Table(results, ("ms",), CONTESTANTS, measured, _line, lambda figure: (figure.bytes,))
    return figures.wrong(table.run(this.rows(ROWS, TINY)))


def _measure(device: torch.device, figure: Figure) -> None:
    """Measure seconds, and on a GPU the peak bytes beyond the inputs."""
    row, loss = figure.row, CONTESTANTS[figure.contestant]
    error = _error(replace(row, tokens=min(row.tokens, CHECKED)), loss, device)
    figures.compare(figure, error, measure.LIMITS[row.dtype])
    x = make_inputs(row, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        x.gradients(loss(x))
        figure.bytes = torch.cuda.max_memory_allocated() - before
    figure.forward = measure.seconds_of(lambda: x.gradients(loss(x)), device)


def _error(row: Row, loss: Callable[[Inputs], torch.Tensor], device: torch.device) -> float:
    x = make_inputs(row, device)
    exact = Inputs(x.hidden.detach().double().requires_grad_(), x.weight.detach().double().requires_grad_(), x.labels)
    truth = exact.gradients(_whole(exact))
    return max(relative_error(got, true) for got, true in zip(x.gradients(loss(x)), truth, strict=True))


def _line(row: Row, measured: list[Figure]) -> str:
    peaks = [f", {f.bytes / 2**20:.0f} MiB" if f.bytes else "" for f in measured]
    said = [f"{f.contestant} {(f.forward or 0) * 1e3:.3f} ms{peak}" for f, peak in zip(measured, peaks, strict=True)]
    return f"{row.name}, forward and backward: " + "; ".join(said)

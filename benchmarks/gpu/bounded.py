"""ABC and cosine attention on one GPU beside flash-linear-attention's kernels; part of `python -m benchmarks.gpu.run`.

Everyone is checked against the definition in fp64 first. The floor is the time in which this GPU copies as many bytes
as the inputs and results have, which no kernel can beat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import longctx
from benchmarks.bounded.contestants import truth
from benchmarks.gpu import figures, measure
from benchmarks.gpu.figures import OURS, Figure, Run, Table
from benchmarks.harness import Verdict, judge
from benchmarks.measure import relative_error
from benchmarks.peers import NotMeasured

Tensors = dict[str, torch.Tensor]
Call = Callable[[], torch.Tensor]
CHECKED = 192
"""Tokens of the check; the definition's memory grows with their square times the slots."""
FLOOR = 0.8
"""Required share of the copy's speed."""


@dataclass(frozen=True)
class Row:
    """A causal layer, forward and backward. operator: "abc" or "cosine"; slots: of ABC."""

    operator: str
    length: int
    head_dim: int = 64
    slots: int = 64
    heads: int = 16
    batch: int = 1
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        slots = f"-m{self.slots}" if self.operator == "abc" else ""
        return f"{self.operator}-{self.length}-d{self.head_dim}{slots}-h{self.heads}-b{self.batch}"


ROWS = tuple(
    Row(operator, length, head_dim, batch=max(1, 16_384 // length))
    for operator in ("abc", "cosine")
    for head_dim in (64, 128)
    for length in (2048, 16_384, 131_072)
)
TINY = (Row("abc", 16, 16, 8, 2, dtype="float32"), Row("cosine", 32, 16, heads=2, dtype="float32"))


def make_inputs(row: Row, device: torch.device, seed: int = 0) -> Tensors:
    """q, k, v (B, H, T, D) and s (B, H, T, M) or m (H,), which want gradients, and grad as q."""
    g = torch.Generator(device).manual_seed(seed)

    def draw(width: int) -> torch.Tensor:
        x = torch.randn(row.batch, row.heads, row.length, width, generator=g, device=device)
        return x.to(getattr(torch, row.dtype)).requires_grad_()

    made = {name: draw(row.head_dim) for name in "qkv"}
    if row.operator == "abc":
        made["s"] = draw(row.slots)
    else:
        made["m"] = torch.full((row.heads,), 0.5, device=device, requires_grad=True)
    return {**made, "grad": draw(row.head_dim).detach()}


def _ours(backend: str) -> Callable[[Row, Tensors], Call]:
    def prepare(row: Row, x: Tensors) -> Call:
        attend, last = (longctx.abc_attention, "s") if row.operator == "abc" else (longctx.cosine_attention, "m")
        return lambda: attend(x["q"], x["k"], x["v"], x[last], backend=backend)  # type: ignore[operator,no-any-return]

    return prepare


def _fla(x: Tensors, module: str, name: str) -> Any:
    try:
        figures.need_gpu(x["q"])
        return getattr(__import__(f"fla.ops.{module}", fromlist=[name]), name)
    except (ImportError, AttributeError) as error:
        raise NotMeasured(f"not measured: flash-linear-attention: {error}") from None
    except NotMeasured as error:
        raise NotMeasured(f"not measured: {error}") from None


def _time_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return (B, H, T, X) as (B, T, H, X), flash-linear-attention's layout."""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def chunk_abc(row: Row, x: Tensors) -> Call:
    call = _fla(x, "abc", "chunk_abc")
    return lambda: call(*_time_first(x["q"], x["k"], x["v"], x["s"]))[0].transpose(1, 2)


def chunk_gsa(row: Row, x: Tensors) -> Call:
    """Gated slot attention with ABC's gates: s' = exp(s_t - z_t), g = z_{t-1} - z_t."""
    call = _fla(x, "gsa", "chunk_gsa")

    def attend() -> torch.Tensor:
        q, k, v, s = _time_first(x["q"], x["k"], x["v"], x["s"])
        z = s.float().logcumsumexp(1)
        gates = torch.cat([z[:, :1], z[:, :-1]], 1) - z
        return call(q, k, v, torch.exp(s - z).to(k.dtype), gates)[0].transpose(1, 2)  # type: ignore[no-any-return]

    return attend


def chunk_linear(row: Row, x: Tensors) -> Call:
    """Cottention as linear attention: unit rows, and values scaled by n^-a."""
    call = _fla(x, "linear_attn", "chunk_linear_attn")
    counts = torch.arange(1, row.length + 1, device=x["q"].device)

    def attend() -> torch.Tensor:
        sizes = counts ** -torch.sigmoid(x["m"])[:, None]
        scaled = (x["v"] * sizes[..., None]).to(x["v"].dtype)
        q, k, v = _time_first(F.normalize(x["q"], dim=-1), F.normalize(x["k"], dim=-1), scaled)
        return call(q, k, v, scale=1.0, normalize=False)[0].transpose(1, 2)  # type: ignore[no-any-return]

    return attend


CONTESTANTS: dict[str, dict[str, Callable[[Row, Tensors], Call]]] = {
    "abc": {OURS: _ours("triton"), "longctx, torch": _ours("chunked"), "fla chunk_abc": chunk_abc,
            "fla chunk_gsa": chunk_gsa},
    "cosine": {OURS: _ours("triton"), "longctx, torch": _ours("chunked"), "fla chunk_linear_attn": chunk_linear},
}  # fmt: skip


def error_of(row: Row, name: str, device: torch.device) -> tuple[float, float]:
    """Return the largest relative error of output and gradients at a short length, and the limit."""
    small = replace(row, length=min(row.length, CHECKED), heads=2, batch=1)
    x = make_inputs(small, device)
    exact = {key: y.detach().double().requires_grad_(key != "grad") for key, y in x.items()}
    blank = {"s": exact["q"].detach(), "m": exact["q"].new_zeros(2)}
    kind = "ABC" if row.operator == "abc" else "Cottention"
    true, call = _with_gradients(truth(kind, blank | exact), exact), CONTESTANTS[row.operator][name](small, x)
    found = [relative_error(a, b) for a, b in zip(_with_gradients(call(), x), true, strict=True)]
    limit = measure.LIMITS[row.dtype]
    return max(found), limit


def _with_gradients(out: torch.Tensor, x: Tensors) -> list[torch.Tensor]:
    wanted = [y for key, y in x.items() if key != "grad"]
    return [out.detach(), *torch.autograd.grad(out, wanted, x["grad"])]


def _measure(device: torch.device, figure: Figure) -> None:
    row, name = figure.row, figure.contestant
    figures.compare(figure, *error_of(row, name, device))
    x = make_inputs(row, device)
    call, wanted = CONTESTANTS[row.operator][name](row, x), [y for key, y in x.items() if key != "grad"]
    out = call()
    figure.backward = measure.seconds_of(lambda: torch.autograd.grad(out, wanted, x["grad"], retain_graph=True), device)
    with torch.no_grad():
        figure.forward = measure.seconds_of(call, device)


def bytes_moved(row: Row) -> tuple[int, int]:
    """Return the bytes that (forward, backward) must at least read and write: inputs and results once each."""
    tokens, size = row.batch * row.heads * row.length, getattr(torch, row.dtype).itemsize
    slots = row.slots if row.operator == "abc" else 0
    inputs = 3 * row.head_dim + slots
    return tokens * size * (inputs + row.head_dim), tokens * size * (2 * inputs + row.head_dim)


def copy_rate(device: torch.device) -> float:
    """Return bytes per second, read plus written, of a large copy."""
    a = torch.empty(2**28, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    return 2.0 * a.nbytes / measure.seconds_of(lambda: b.copy_(a), device)


def verdicts(found: list[Figure], rate: float) -> Iterator[Verdict]:
    """Require ours to be as fast as every peer, and near the copy of its bytes; what was not measured is not judged."""
    by_name = {(f.row, f.contestant): f for f in found}
    for ours in (f for f in found if f.contestant == OURS and f.forward and f.row.length >= 16_384):
        for place, direction in enumerate(("forward", "backward")):
            own, name = getattr(ours, direction), f"{ours.row.name} {direction}"
            for peer in CONTESTANTS[ours.row.operator]:
                theirs = getattr(by_name[ours.row, peer], direction)
                if peer.startswith("fla") and theirs:
                    yield f"{name}: {theirs / own:.2f} x {peer}, required 1.0", theirs >= own
            share = bytes_moved(ours.row)[place] / rate / own
            yield f"{name}: {share:.2f} of the bandwidth floor, required {FLOOR}", share >= FLOOR


def run(this: Run) -> list[Figure]:
    """Measure the wanted rows, print one line per row and every verdict, append each figure to bounded_gpu.csv."""
    columns = ("forward_ms", "backward_ms")
    results, found = this.results("bounded", columns), []
    for operator, contestants in CONTESTANTS.items():
        ours = tuple(name for name in contestants if name.startswith(OURS))
        table = Table(results, columns, contestants, partial(_measure, this.device), _line, ours=ours)
        found += table.run(row for row in this.rows(ROWS, TINY) if row.operator == operator)
    if found and this.device.type == "cuda":
        judge(verdicts(found, copy_rate(this.device)))
    return found


def _line(row: Row, measured: list[Figure]) -> str:
    parts = [f"{f.contestant} {1e3 * (f.forward or 0):.3g}/{1e3 * (f.backward or 0):.3g}" for f in measured]
    return f"{row.name}: ms forward/backward: {', '.join(parts)}"

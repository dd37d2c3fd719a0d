"""Print a plan as tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from longctx.plan.memory import PARTS
from longctx.plan.plan import Plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show(plan: Plan) -> None:
    """Print a plan: memory by moment and part, time, traffic, overlap, the longest sequence, and what to change."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    _head(console, plan)
    console.print(_memory(plan))
    if plan.step_bytes.host:
        held = ", ".join(f"{name} {_size(value)}" for name, value in plan.step_bytes.host.items())
        console.print(f"in host memory, per rank: {held}")
    if plan.step_bytes.disk:
        console.print(f"on NVMe, per rank: optimizer {_size(plan.step_bytes.disk)}")
    console.print(_time(plan))
    _traffic(console, plan)
    _limit(console, plan)


def _head(console: Console, plan: Plan) -> None:
    shape, setup, machine = plan.shape, plan.setup, plan.machine
    console.print(
        f"model    {shape.parameters / 1e9:,.2f} G parameters, {shape.layers} layers of {shape.hidden}, heads "
        f"{shape.heads}:{shape.kv_heads} x {shape.head_dim}, {'bf16' if shape.itemsize == 2 else 'fp32'}"
    )
    console.print(
        f"ranks    {setup.world} x {machine.name} = data {setup.data} x ring {setup.ring} x ulysses {setup.ulysses}, "
        f"ZeRO-{setup.stage}{f' with a copy of the weights among {setup.group}' if setup.group else ''}, recompute "
        f"{setup.recompute}"
    )
    console.print(f"rows     {setup.tokens:,} tokens, {setup.local:,} per rank ({setup.layout})")
    peak = plan.step_bytes.peak
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    console.print(
        f"memory   {_size(peak.total)} per rank at the peak ({peak.name}), {_size(plan.machine.usable)} usable of "
        f"{_size(plan.machine.memory)}: {verdict}\n"
    )


def _memory(plan: Plan) -> Table:
    """Return the table of bytes: one row per part, one column per moment, the peak marked."""
    moments = plan.step_bytes.moments
    table = _table("GiB per rank", *(moment.name for moment in moments))
    for part in PARTS:
        values = [moment.parts.get(part, 0) for moment in moments]
        if any(values):
            table.add_row(part, *(f"{value / 2**30:.3f}" if value else "" for value in values))
    peak = plan.step_bytes.peak.name
    totals = [f"{'> ' if moment.name == peak else ''}{moment.total / 2**30:.3f}" for moment in moments]
    table.add_row("all", *totals, style="bold")
    return table


def _time(plan: Plan) -> Table:
    speed = plan.speed
    table = _table("one step", "seconds", "share")
    for name, seconds in speed.seconds.items():
        table.add_row(name, f"{seconds:,.3f}", f"{seconds / speed.total:.1%}")
    table.add_row("all", f"{speed.total:,.3f}", f"MFU {speed.mfu:.1%}", style="bold")
    return table


def _traffic(console: Console, plan: Plan) -> None:
    setup, wire, overlap = plan.setup, plan.wire, plan.speed.overlap
    console.print(
        f"speed    {plan.speed.tokens_per_second:,.0f} tokens/s, {plan.speed.tokens_per_second / setup.world:,.0f} per "
        f"device; {plan.flops.useful * setup.accumulation:.3g} useful FLOPs per rank and step, "
        f"{plan.flops.done * setup.accumulation:.3g} executed"
    )
    parts = {
        "ring": wire.ring_forward + wire.ring_backward,
        "all-to-all": wire.ulysses,
        "states": wire.states,
        "ZeRO": wire.zero,
    }
    sent = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
    console.print(f"traffic  {sent or 'nothing'} sent per rank and micro-batch")
    if setup.ring > 1:
        console.print(
            f"overlap  attention {'hides' if overlap.hidden else 'does NOT hide'} the ring's messages: "
            f"{overlap.tokens:,} tokens per rank, {overlap.least_forward:,.0f} needed forward, "
            f"{overlap.least_backward:,.0f} backward"
        )


def _limit(console: Console, plan: Plan) -> None:
    if plan.longest:
        console.print(f"\nlongest  {plan.longest:,} tokens fit with these settings")
    else:
        console.print("\nlongest  nothing fits with these settings: weights and optimizer alone are too large")
    if not plan.further:
        console.print("further  no setting that this plan knows makes it longer")
        return
    table = _table("for longer sequences, change", "longest", "peak at this length")
    for change in plan.further:
        table.add_row(change.what, f"{change.longest:,}", _size(change.peak))
    console.print(table)


def _table(first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _size(value: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:,.2f} {unit}"
    return f"{value:,.0f} B"

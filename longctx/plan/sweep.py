"""Plot `longctx plan --sweep FILE.png`: memory against sequence length, and the longest sequence against devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longctx.errors import MissingPackageError
from longctx.layout import get_layout
from longctx.plan.limit import longest
from longctx.plan.machines import Machine
from longctx.plan.memory import PARTS, step_bytes
from longctx.plan.setup import Recompute, Setup
from longctx.plan.shape import ModelShape

POLICIES: tuple[Recompute, ...] = ("none", "mlp", "layer_keep_attention", "layer")
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)


def lengths_to(most: int, setup: Setup, points: int = 24) -> list[int]:
    """Return row lengths from a sixteenth of ``most`` to a little beyond it, as multiples of what the layout needs."""
    multiple = get_layout(setup.layout).multiple(setup.ring, setup.ulysses)
    return sorted({max(int(most * (i + 1.5) / points) // multiple, 1) * multiple for i in range(points)})


def parts_by_length(shape: ModelShape, setup: Setup, lengths: Sequence[int]) -> dict[str, list[float]]:
    """Return the GiB of every part at the peak, for each row length."""
    peaks = [step_bytes(shape, replace(setup, tokens=length)).peak.parts for length in lengths]
    found = {part: [peak.get(part, 0) / 2**30 for peak in peaks] for part in PARTS}
    return {part: values for part, values in found.items() if any(values)}


def longest_by_devices(shape: ModelShape, setup: Setup, machine: Machine) -> dict[str, list[int]]:
    """Return the longest row on rings of DEVICES devices, for each recomputation policy."""
    return {
        policy: [
            longest(shape, replace(setup, recompute=policy, ring=max(devices // setup.ulysses, 1)), machine)
            for devices in DEVICES
        ]
        for policy in POLICIES
    }


def draw(shape: ModelShape, setup: Setup, machine: Machine, path: Path) -> Path:
    """Draw both plots, without a display, and return the path.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib is not installed: pip install 'longctx[plot]'") from None
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_memory(left, shape, setup, machine)
    _draw_devices(right, shape, setup, machine)
    what = f"{shape.parameters / 1e9:.1f} G parameters, {shape.layers} layers of {shape.hidden}"
    figure.suptitle(f"{what}, ZeRO-{setup.stage}, {machine.name}: predicted by longctx plan")
    figure.savefig(path, dpi=120)
    return path


def _draw_memory(axes: Any, shape: ModelShape, setup: Setup, machine: Machine) -> None:
    """Stack the parts of the peak over row lengths, up to where they no longer fit."""
    lengths = lengths_to(longest(shape, setup, machine) or setup.tokens, setup)
    parts = parts_by_length(shape, setup, lengths)
    thousands = [length / 1024 for length in lengths]
    axes.stackplot(thousands, list(parts.values()), labels=list(parts), colors=_colours(len(parts)))
    axes.axhline(machine.usable / 2**30, color="black", linestyle="--", linewidth=1, label="usable")
    axes.axvline(setup.tokens / 1024, color="black", linestyle=":", linewidth=1, label="this run")
    axes.set_xlim(thousands[0], max(thousands[-1], setup.tokens / 1024))
    axes.set_xlabel("tokens per row (multiples of 1,024)")
    axes.set_ylabel("GiB per rank at the peak")
    axes.set_title(f"ring {setup.ring}, recompute {setup.recompute}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8)


def _draw_devices(axes: Any, shape: ModelShape, setup: Setup, machine: Machine) -> None:
    """Plot the longest row over devices, one line per policy."""
    for policy, found in longest_by_devices(shape, setup, machine).items():
        fitting = [(devices, length) for devices, length in zip(DEVICES, found, strict=True) if length]
        if fitting:
            axes.plot(*zip(*fitting, strict=True), "o-", markersize=4, label=f"recompute: {policy}")
    axes.plot([setup.sequence], [setup.tokens], "k*", markersize=11, label="this run")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(DEVICES, [str(devices) for devices in DEVICES])
    low, high = axes.get_ylim()
    ticks = [2**power for power in range(10, 36) if low <= 2**power <= high]
    axes.set_yticks(ticks, [_tokens(tick) for tick in ticks])
    axes.set_xlabel("devices per row")
    axes.set_ylabel("longest row that fits, tokens")
    axes.set_title("longest sequence")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab20"](index % 20) for index in range(count)]


def _tokens(value: int) -> str:
    return f"{value // 2**20}M" if value >= 2**20 else f"{value // 2**10}K"

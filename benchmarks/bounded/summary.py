"""Summarise finished runs: a table with spread, paired differences, and two plots."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.bounded.variants import CLAIMS

Results = list[dict[str, Any]]


def report(results: Results, folder: Path) -> None:
    """Write comparison.json, comparison.md and comparison.png from the runs finished so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    (folder / "comparison.md").write_text("\n".join([*table(results), "", *differences(results), ""]))
    plot(results, folder / "comparison.png")


def by_variant(results: Results) -> dict[str, dict[int, dict[str, Any]]]:
    """Return variant -> seed -> result."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        found.setdefault(result["variant"], {})[result["seed"]] = result
    return found


def table(results: Results) -> list[str]:
    """Return a Markdown table: held-out loss over seeds, first and last quarter of the row, training speed."""
    lines = [
        "| variant | seeds | held-out loss | spread (sd) | worst evaluation rise | first quarter | last quarter "
        "| tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in by_variant(results).items():
        losses = [run["held_out_loss"] for run in seeds.values()]
        quarter = [_quarters(run["by_position"]) for run in seeds.values()]
        spread = f"{stdev(losses):.4f}" if len(losses) > 1 else "one seed"
        rise = max(_rise(run["held_out_losses"]) for run in seeds.values())
        speed = mean(run["tokens"] / run["seconds"] for run in seeds.values())
        first, last = mean(q[0] for q in quarter), mean(q[1] for q in quarter)
        lines.append(
            f"| {name} | {len(losses)} | {mean(losses):.4f} | {spread} | {rise:.3f} | {first:.4f} | {last:.4f} "
            f"| {speed:,.0f} |"
        )
    return lines


def differences(results: Results) -> list[str]:
    """Return a Markdown table of paired differences: mean, standard error, and each seed's sign."""
    found = by_variant(results)
    lines = [
        "| a minus b (nats, below zero: a is better) | mean | standard error | seeds where a is better |",
        "|---|---|---|---|",
    ]
    for a, b, what in CLAIMS:
        seeds = sorted(set(found.get(a, {})) & set(found.get(b, {})))
        if not seeds:
            continue
        gaps = [found[a][seed]["held_out_loss"] - found[b][seed]["held_out_loss"] for seed in seeds]
        error = f"{stdev(gaps) / len(gaps) ** 0.5:.4f}" if len(gaps) > 1 else "one seed"
        lines.append(f"| {what} | {mean(gaps):+.4f} | {error} | {sum(gap < 0 for gap in gaps)} of {len(gaps)} |")
    return lines


def plot(results: Results, path: Path) -> None:
    """Plot held-out loss over the steps, and loss over the position in the row, with a band over seeds."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set_prop_cycle(color=colormaps["tab20"].colors)  # more variants than the usual ten colours
    for name, seeds in by_variant(results).items():
        runs = list(seeds.values())
        steps = [point["step"] for point in runs[0]["held_out_losses"]]
        _band(left, steps, [[point["loss"] for point in run["held_out_losses"]] for run in runs], name)
        share = [(i + 0.5) / len(runs[0]["by_position"]) for i in range(len(runs[0]["by_position"]))]
        _band(right, share, [run["by_position"] for run in runs], name)
    left.set_xlabel("optimizer step")
    left.set_ylabel("held-out loss (nats per token)")
    right.set_xlabel("position, as a share of the row")
    right.set_ylabel("held-out loss (nats per token)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _band(axes: Any, xs: list[float], curves: list[list[float]], name: str) -> None:
    curves = [curve for curve in curves if len(curve) == len(xs)]
    columns = list(zip(*curves, strict=True))
    (line,) = axes.plot(xs, [mean(column) for column in columns], label=name, linewidth=1.2)
    axes.fill_between(xs, list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.15)


def _quarters(curve: list[float]) -> tuple[float, float]:
    size = max(len(curve) // 4, 1)
    return mean(curve[:size]), mean(curve[-size:])


def _rise(points: list[dict[str, float]]) -> float:
    """Return the largest rise from one evaluation to the next: 0 for training that only falls."""
    losses = [point["loss"] for point in points]
    return max([0.0, *(after - before for before, after in zip(losses, losses[1:], strict=False))])

"""Plot training and held-out loss over the steps, from metrics.jsonl to loss.png."""

from __future__ import annotations

from pathlib import Path

from longctx.errors import DataError, MissingPackageError
from longctx.train.report import metrics

NAME = "loss.png"


def plot_loss(folder: Path) -> Path:
    """Draw ``folder/loss.png`` from ``folder/metrics.jsonl`` and return its path. No display is needed.

    Raises:
        DataError: there are no metrics to plot.
        MissingPackageError: matplotlib is not installed.
    """
    records = [record for record in metrics.read(folder) if record.get("loss") is not None]
    if not records:
        raise DataError(f"{folder / metrics.NAME} holds no step yet; train first, then plot")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib is not installed: pip install 'longctx[plot]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], label="training", linewidth=1.2)
    held_out = metrics.held_out(records)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label=f"held out (last {held_out[-1][1]:.3f})", markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{folder.name}: {records[-1]['step']} steps")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / NAME, dpi=120)
    return folder / NAME

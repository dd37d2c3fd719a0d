"""loss.png."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.errors import DataError
from longctx.train.report.metrics import Metrics
from longctx.train.report.plot import plot_loss


def test_plot_is_a_png_without_a_display(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no step"):
        plot_loss(tmp_path)
    writer = Metrics(tmp_path)
    for step in range(1, 20):
        writer.write({"step": step, "loss": 9 / step} | ({"eval_loss": 10 / step} if step % 5 == 0 else {}))
    writer.close()
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")

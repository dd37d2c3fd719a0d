"""The plot of `longctx plan --sweep` shows the planner's figures, without a display."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.plan.limit import longest
from longctx.plan.machines import MACHINES
from longctx.plan.memory import peak_bytes
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape
from longctx.plan.sweep import DEVICES, draw, lengths_to, longest_by_devices, parts_by_length

SHAPE, H100 = ModelShape(2048, 20, 32, 8, 64, 5504, 32768), MACHINES["h100"]
SETUP = Setup(2**18, ring=8, recompute="layer_keep_attention", loss_tile=4096, mlp_tile=2048)


def test_parts_add_up_to_the_peak() -> None:
    parts = parts_by_length(SHAPE, SETUP, [SETUP.tokens])
    assert sum(values[0] for values in parts.values()) == pytest.approx(peak_bytes(SHAPE, SETUP) / 2**30)
    lengths = lengths_to(2**20, SETUP)
    assert lengths == sorted(set(lengths)) and all(length % 16 == 0 for length in lengths)


def test_more_devices_and_less_kept_take_longer_rows() -> None:
    lines = longest_by_devices(SHAPE, SETUP, H100)
    assert lines["layer_keep_attention"][DEVICES.index(8)] == longest(SHAPE, SETUP, H100)
    for found in lines.values():
        assert found == sorted(found)
    assert all(a < b for a, b in zip(lines["none"], lines["layer"], strict=True))


def test_it_is_drawn(tmp_path: Path) -> None:
    path = draw(SHAPE, SETUP, H100, tmp_path / "sweep.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000

"""The printed plan shows the plan's own numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longctx.plan.machines import MACHINES
from longctx.plan.plan import Plan, make_plan
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape
from longctx.plan.show import show

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)
SETUP = Setup(2**20, ring=64, recompute="layer_keep_attention", loss_tile=1040, mlp_tile=2048, recompute_norms=True)


def shown(setup: Setup, capsys: pytest.CaptureFixture[str]) -> tuple[Plan, str]:
    plan = make_plan(LLAMA_8B, setup, MACHINES["h100"])
    show(plan)
    return plan, capsys.readouterr().out


def rows(text: str) -> dict[str, list[str]]:
    """Return the words of every line by its first cell, which ends at two spaces."""
    lines = [line.partition("  ") for line in text.splitlines()]
    return {first: rest.split() for first, _, rest in lines}


def test_every_part_of_every_moment_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    plan, text = shown(SETUP, capsys)
    memory, _, time = text.partition("one step")
    moments, table = plan.step_bytes.moments, rows(memory)
    for part in {part for moment in moments for part in moment.parts}:
        values = [moment.parts[part] for moment in moments if moment.parts.get(part)]
        assert table[part] == [f"{value / 2**30:.3f}" for value in values], part
    marked = table["all"]
    assert marked.count(">") == 1
    assert marked[marked.index(">") + 1] == f"{plan.step_bytes.peak.total / 2**30:.3f}"
    for activity, seconds in plan.speed.seconds.items():
        assert rows(time)[activity] == [f"{seconds:,.3f}", f"{seconds / plan.speed.total:.1%}"]


def test_the_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    plan, text = shown(SETUP, capsys)
    assert plan.fits and text.count(": fits") == 1 and "attention hides the ring's messages" in text
    assert rows(text)["longest"][0] == f"{plan.longest:,}"
    for change in plan.further:
        assert f"{change.longest:,}" in rows(text)[change.what]
    _, text = shown(replace(SETUP, tokens=2**16, stage=0), capsys)
    assert "DOES NOT FIT" in text and "does NOT hide" in text and "nothing fits with these settings" in text


def test_what_is_not_on_the_device_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    _, text = shown(SETUP, capsys)
    assert "in host memory" not in text and "NVMe" not in text and "a copy of the weights" not in text
    _, text = shown(replace(SETUP, offload_optimizer=True, swap_optimizer=True, group=8), capsys)
    assert "in host memory, per rank: optimizer " in text and "on NVMe, per rank: optimizer " in text
    assert "ZeRO-3 with a copy of the weights among 8" in text

"""backend="auto" on a GPU: chosen by a table of measurements, announced once, and by nothing where there is none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import table
from longctx.attention.backends import choose, measured
from longctx.attention.backends.measured import Call, Measured
from longctx.attention.band import make_rule
from longctx.attention.scores import Scores

CHIP = "A GPU"


def rows(**times: float) -> list[Measured]:
    """Times of backends in two lengths of one kind of call; twice as slow and in reverse order at the longer one."""
    short, long = (Call("bfloat16", 128, 1, True, length) for length in (2048, 32768))
    reverse = dict(zip(times, reversed(list(times.values())), strict=True))
    both = ((short, times), (long, reverse))
    return [Measured(CHIP, call, name.replace("_", "-"), time) for call, part in both for name, time in part.items()]


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU of that name and a made-up table of it; tensors on torch's meta device stand for its own."""
    path = tmp_path / "measured.csv"
    measured.write(rows(triton=3.0, triton_tma=2.0, cudnn=1.0), path)
    made = measured.read(path)
    monkeypatch.setattr(choose.measured, "read", lambda: made)
    monkeypatch.setattr(choose, "_chip", lambda device, kind: CHIP)
    return path


def fastest(length: int, pattern: str = "causal", scores: Scores | None = None, dim: int = 128, heads: int = 1) -> str:
    q = torch.empty(1, heads, length, dim, dtype=torch.bfloat16, device="meta")
    return choose.fastest(q, q[:, :1], "cuda", scores or Scores(1.0), pattern)[0]


def test_the_fastest_of_those_that_can(chip: Path) -> None:
    assert fastest(2048) == "cudnn"
    assert fastest(1000) == "cudnn", "below the shortest: the shortest"
    assert fastest(30000) == "cudnn", "the next shorter"
    assert fastest(32768) == fastest(1 << 20) == "triton"
    assert fastest(2048, "other") == "triton-tma", "torch's operators know no window and no documents"
    assert fastest(2048, scores=Scores(1.0, softcap=2.0)) == "triton-tma"
    assert fastest(2048, dim=100) == "triton-tma", "torch's want multiples of 8"
    assert fastest(2048, heads=8) == "cudnn", "the next smaller group"


def test_nothing_is_concluded_for_what_was_not_measured(chip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest(2048, "full") == "triton"
    assert fastest(2048, dim=256) == "triton"
    q = torch.empty(1, 1, 2048, 128, dtype=torch.float16, device="meta")
    assert choose.fastest(q, q, "cuda", Scores(1.0), "causal")[0] == "triton", "another dtype"
    monkeypatch.setattr(choose, "_chip", lambda device, kind: "Another GPU")
    name, reason = choose.fastest(q.bfloat16(), q.bfloat16(), "cuda", Scores(1.0), "causal")
    assert name == "triton" and "Another GPU" in reason


def test_the_committed_table_has_no_row_that_nobody_measured() -> None:
    """Empty until a GPU has been measured; then, every row is one of the committed results."""
    committed = measured.read()
    assert bool(committed) == table.RESULTS.exists()
    assert set(committed) <= set(table.rows_of(table.RESULTS) if table.RESULTS.exists() else ())


def test_what_is_announced_once(chip: Path, caplog: pytest.LogCaptureFixture) -> None:
    choose._announce.cache_clear()
    q = torch.empty(1, 1, 2048, 128, dtype=torch.bfloat16, device="meta")
    with caplog.at_level(logging.INFO, "longctx"):
        for _ in range(3):
            choose._announce("cuda", *choose.fastest(q, q, "cuda", Scores(1.0), "causal"))
    (record,) = caplog.records
    assert "cudnn" in record.getMessage() and f"measured fastest on {CHIP}" in record.getMessage()


def test_patterns() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert choose.pattern_of(make_rule(True, None), None) == "causal"
    assert choose.pattern_of(make_rule(False, None), None) == "full"
    for rule, documents in (
        (make_rule(True, 4), None),
        (make_rule(True, None), ids),
        (make_rule(False, (None, 3)), None),
    ):
        assert choose.pattern_of(rule, documents) == "other"
    assert choose.pattern_of(make_rule(True, None, 7), None) == "other"


RESULTS = """\
row,dtype,contestant,forward_ms,backward_ms,note,chip
16384-d128-causal-h16g16-b1,bfloat16,longctx,9.0,9.0,,A GPU
16384-d128-causal-h16g16-b1,bfloat16,longctx,1.0,2.0,,A GPU
16384-d128-causal-h16g16-b1,bfloat16,"longctx, TMA",1.0,1.0,error 1.0e+00 in dq,A GPU
16384-d128-causal-h16g16-b1,bfloat16,longctx over cuDNN,not measured,not measured,needs a GPU,A GPU
16384-d128-causal-h16g16-b1,bfloat16,SDPA cuDNN,1.0,1.0,,A GPU
16384-d128-causal-h32g4-b1,bfloat16,"longctx, TMA",2.0,3.5,,A GPU
65536-d128-causal-h16g16-b1-window4096,bfloat16,longctx,1.0,1.0,,A GPU
"""


def test_a_table_is_made_of_results(tmp_path: Path) -> None:
    """Plain rows of right results alone, of two measurements the last."""
    (tmp_path / "results.csv").write_text(RESULTS)
    made = table.rows_of(tmp_path / "results.csv")
    expected = [
        Measured("A GPU", Call("bfloat16", 128, 1, True, 16384), "triton", 3.0),
        Measured("A GPU", Call("bfloat16", 128, 8, True, 16384), "triton-tma", 5.5),
    ]
    assert made == expected
    measured.write(made, tmp_path / "measured.csv")
    assert list(measured.read(tmp_path / "measured.csv")) == expected

"""A run with Ulysses trains the same model as a ring, and recomputation repeats no all-to-all."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import config, losses, weights, write

from longctx.attention.comm import counters
from longctx.train.run import run

from distributed import run_ranks
from tolerances import tolerance

# AdamW's first steps are the signs of gradients, rounding errors of gradients of 1e-9 too with the usual eps of 1e-8.
EPS = "train.eps=1e-6"
RUNS = {
    "ring": ("mesh.ring=2",),
    "exchanged": ("mesh.ring=auto", "mesh.ulysses=auto"),
    "kept": ("mesh.ring=1", "mesh.ulysses=2", "memory.recompute=layer_keep_attention"),
}


def train(rank: int, world: int, folder: str) -> dict[str, tuple[int, int]]:
    """(hops, exchanges) of every run."""
    found = {}
    for name, overrides in RUNS.items():
        counters.reset()
        run(config(Path(folder), "zero.stage=3", EPS, *overrides, name=name))
        found[name] = counters.hops, counters.exchanges
    return found


@pytest.mark.deep
def test_a_yaml_with_exchanged_heads_trains_alike(tmp_path: Path) -> None:
    for name in RUNS:
        write(tmp_path, name)
    for found in run_ranks(2, train, str(tmp_path), timeout=280):
        assert found["ring"][0] > 0 and found["ring"][1] == 0
        assert found["exchanged"][0] == 0 and found["exchanged"][1] > 0
        assert found["kept"] == found["exchanged"]
    for name in ("exchanged", "kept"):
        for got, truth in zip(losses(tmp_path / name), losses(tmp_path / "ring"), strict=True):
            assert float.fromhex(got) == pytest.approx(float.fromhex(truth), rel=tolerance("training loss"))
        expected = weights(tmp_path / "ring")
        for key, weight in weights(tmp_path / name).items():
            assert (weight - expected[key]).norm() <= tolerance("training weight") * expected[key].norm(), key

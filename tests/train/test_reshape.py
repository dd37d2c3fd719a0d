"""A run that resumes on a different number of ranks has the same rows, losses and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import config, losses, weights, write

from longctx.train.run import run

from distributed import run_ranks
from tolerances import tolerance

LIMIT = 280.0
BATCH = "train.global_batch=4"


def train(rank: int, world: int, folder: str, name: str, overrides: tuple[str, ...]) -> str:
    try:
        run(config(Path(folder), *overrides, name=name))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def on(world: int, folder: Path, name: str, *overrides: str) -> None:
    answers = run_ranks(world, train, str(folder), name, (BATCH, *overrides), timeout=LIMIT)
    assert answers == ["no error"] * world, answers


def require_equal(folder: Path, dtype: str) -> None:
    """The run in parts is the whole one, and has left nothing behind."""
    limit = tolerance("training loss" if dtype == "fp32" else "bf16 training loss")
    pairs = zip(losses(folder / "parts"), losses(folder / "whole"), strict=True)
    assert all(float.fromhex(part) == pytest.approx(float.fromhex(whole), rel=limit) for part, whole in pairs)
    parts, whole = weights(folder / "parts"), weights(folder / "whole")
    for name, truth in whole.items():
        assert (parts[name].double() - truth.double()).norm() <= limit * truth.double().norm(), name
    assert not [path for path in (folder / "parts" / "checkpoints").iterdir() if path.name.startswith(".")]


LARGER = ((4, 3, "fp32"), (4, 1, "fp32"), (4, 2, "fp32"), (4, 3, "bf16"))  # a ring of two


@pytest.mark.parametrize(
    "world, stage, dtype", [(2, 3, "fp32"), *(pytest.param(*one, marks=pytest.mark.deep) for one in LARGER)]
)
def test_other_numbers_of_ranks_give_the_same_run(tmp_path: Path, world: int, stage: int, dtype: str) -> None:
    ring, back = world // 2, world == 4
    same = (f"zero.stage={stage}", f"model.dtype={dtype}", f"mesh.ring={ring}", "train.schedule=constant")
    write(tmp_path, "whole")
    write(tmp_path, "parts")
    on(world, tmp_path, "whole", *same, "mesh.data=2", "train.steps=6")
    on(world, tmp_path, "parts", *same, "mesh.data=2", "train.steps=2")
    on(ring, tmp_path, "parts", *same, "mesh.data=1", f"train.steps={4 if back else 6}", "checkpoint.resume=must")
    if back:
        on(world, tmp_path, "parts", *same, "mesh.data=2", "train.steps=6", "checkpoint.resume=must")
    require_equal(tmp_path, dtype)


@pytest.mark.deep
def test_copies_of_the_weights_come_and_go_with_the_ranks(tmp_path: Path) -> None:
    """Four ranks with a copy in every two, two ranks that have no room for one, four again."""
    same = ("zero.stage=3", "mesh.ring=2", "train.schedule=constant")
    four = (*same, "mesh.data=2", "zero.group=2")
    write(tmp_path, "whole")
    write(tmp_path, "parts")
    on(4, tmp_path, "whole", *four, "train.steps=6")
    on(4, tmp_path, "parts", *four, "train.steps=2")
    on(2, tmp_path, "parts", *same, "mesh.data=1", "train.steps=4", "checkpoint.resume=must")
    on(4, tmp_path, "parts", *four, "train.steps=6", "checkpoint.resume=must")
    require_equal(tmp_path, "fp32")

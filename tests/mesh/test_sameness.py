"""Ranks that were given different things stop, all of them, and name what differs."""

from __future__ import annotations

import re

import pytest

from longctx.errors import EngineError, LongctxError, MeshError
from longctx.mesh import Mesh
from longctx.sameness import code_and_packages, compare_ranks, flatten

from distributed import run_ranks


def compared(rank: int, world: int, fault: str) -> str:
    values = {"layout": "zigzag", **flatten({"optimizer": {"params": {"lr": 0.1}}}), **code_and_packages()}
    problem = None
    if fault == "value" and rank == 1:
        values["optimizer.params.lr"] = "0.2"
    if fault == "key" and rank == 1:
        values["seed"] = "3"
    if fault == "long" and rank == 0:
        values["shapes"] = "x" * 5000
    if fault == "long" and rank == 1:
        values["shapes"] = "x" * 4999 + "y"
    if fault == "problem" and rank == 0:
        problem = ValueError("zero_optimisation is unknown")
    try:
        compare_ranks(values, problem)
    except (LongctxError, ValueError) as error:
        return str(error)
    return "equal"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", "equal"),
        ("value", r"optimizer\.params\.lr: 0\.1 on rank 0, 0\.2 on rank 1"),
        ("key", r"seed: \(not given\) on rank 0, 3 on rank 1"),
        ("long", r"shapes: x+… \(sha256 \w+\) on rank 0, x+… \(sha256 \w+\) on rank 1"),
        ("problem", "zero_optimisation is unknown"),
    ],
)
def test_a_difference_is_named_on_every_rank(fault: str, said: str) -> None:
    messages = run_ranks(2, compared, fault)
    assert all(re.search(said, message) for message in messages), messages
    if fault == "problem":
        assert messages[1].startswith("rank 0 refused what it was given") and "all" not in messages[0]


def grids(rank: int, world: int) -> str:
    with pytest.raises(MeshError) as error:
        Mesh(ring=2 if rank == 0 else 1).connect()
    Mesh(ring=2).connect()  # and the world still works
    return str(error.value)


def test_ranks_with_different_grids_are_stopped_before_groups_are_made() -> None:
    for message in run_ranks(2, grids):
        assert "Mesh(ring=…): 2 on rank 0, 1 on rank 1" in message and "Mesh(data=…): 1 on rank 0" in message


def test_one_rank_compares_with_nobody_and_still_raises_its_problem() -> None:
    compare_ranks({"a": 1})
    with pytest.raises(EngineError, match="mine"):
        compare_ranks({}, EngineError("mine"))


def test_settings_are_flattened_to_dotted_names() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, "x"]}) == {"a.b": "1", "a.c": "{}", "d": '[1, "x"]'}
    assert {"package torch", "source of longctx", "python"} <= set(code_and_packages())

"""Ranks that were given different things stop by name, all of them, before anything is built."""

from __future__ import annotations

from pathlib import Path

from tiny_run import config, write

from longctx.errors import ConfigError, LongctxError
from longctx.train.run import run
from longctx.train.same_start import compare_start

from distributed import run_ranks

DIFFERENCES = {
    "train.lr=0.5": "train.lr: 0.01 on rank 0, 0.5 on rank 1",
    "train.seed=3": "train.seed: 0 on rank 0, 3 on rank 1",
    "data.seed=3": "data.seed",
    "train.clip=null": "train.clip: 1.0 on rank 0, null on rank 1",
    "attention.layout=striped": "attention.layout: zigzag on rank 0, striped on rank 1",
    "mesh.ring=1": "mesh.ring: 2 on rank 0, 1 on rank 1",
    "zero.stage=1": "zero.stage: 3 on rank 0, 1 on rank 1",
    "model.layers=3": "model.layers",
    "data.sequence_length=64": "data.sequence_length",
    "train.steps=9": "train.steps",
    "model.dtype=bf16": "model.dtype",
    "train.global_batch=4": "train.global_batch",
    "train.eval_every=1": "train.eval_every",
    "checkpoint.every=1": "checkpoint.every",
    "checkpoint.resume=never": "checkpoint.resume",
    "output.folder=elsewhere": "output.folder",
    "memory.recompute=layer": "memory.recompute",
    "deepspeed={wall_clock_breakdown: true}": "deepspeed",
}


def differing(rank: int, world: int, folder: str) -> list[str]:
    answers = []
    for override in DIFFERENCES:
        # "data=2" where the ring is 1, so that each rank's own mesh fills the world
        more = ("mesh.data=2",) if override == "mesh.ring=1" else ()
        try:
            run(config(Path(folder), *((override, *more) if rank == 1 else ())))
            answers.append("nothing was said")
        except LongctxError as error:
            answers.append(str(error))
    return answers


def test_ranks_with_different_settings_are_named_on_all_ranks_before_anything_is_built(tmp_path: Path) -> None:
    write(tmp_path)
    for answers in run_ranks(2, differing, str(tmp_path)):
        for answer, named in zip(answers, DIFFERENCES.values(), strict=True):
            assert "the ranks do not agree" in answer and named in answer
    assert not (tmp_path / "run").exists()


def broken_on_one(rank: int, world: int, folder: str) -> str:
    given = config(Path(folder))
    problem = ConfigError("run.yaml:3  train.lr: got 'x'") if rank == 1 else None
    try:
        compare_start(None if problem else given, problem)
    except LongctxError as error:
        return str(error)
    return "nothing was said"


def test_a_mistake_in_one_ranks_yaml_stops_all_and_is_shown(tmp_path: Path) -> None:
    write(tmp_path)
    answers = run_ranks(2, broken_on_one, str(tmp_path))
    assert "rank 1" in answers[0] and all("train.lr: got 'x'" in answer for answer in answers)


def folders_of_the_host(rank: int, world: int, folder: str) -> None:
    compare_start(config(Path(folder), f"launch.python=/python-{rank}", f"launch.folder=/folder-{rank}"))


def test_what_may_differ_from_host_to_host_may_differ(tmp_path: Path) -> None:
    write(tmp_path)
    run_ranks(2, folders_of_the_host, str(tmp_path))


def other_code(rank: int, world: int, folder: str) -> str:
    from longctx.train import same_start

    known = same_start.code_and_packages
    same_start.code_and_packages = lambda: known() | ({"package torch": "0.1"} if rank else {})
    try:
        compare_start(config(Path(folder)))
    except LongctxError as error:
        return str(error)
    finally:
        same_start.code_and_packages = known
    return "nothing was said"


def test_other_packages_on_one_rank_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    for answer in run_ranks(2, other_code, str(tmp_path)):
        assert "package torch" in answer and "0.1 on rank 1" in answer

"""What goes wrong while saving, loading or computing: the older checkpoint stays, all ranks hear of it, no hang."""

from __future__ import annotations

import dataclasses
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import config, losses, write

from longctx.data.build import build_tokens
from longctx.errors import LongctxError
from longctx.train import durable
from longctx.train.checkpoint import checkpointer as checkpoint
from longctx.train.checkpoint import manifest
from longctx.train.lock import FolderLock
from longctx.train.run import run

from distributed import RankFailure, run_ranks

LIMIT = 280.0


def train(rank: int, world: int, folder: str, overrides: tuple[str, ...] = ()) -> int:
    return run(config(Path(folder), *overrides))


def train_with_a_full_disk(rank: int, world: int, folder: str, overrides: tuple[str, ...], full: int) -> str:
    """From its second save on, rank ``full`` can write no file larger than 4 KB; return what is raised."""
    save = checkpoint._save_engine
    calls = []

    def limited(*arguments: Any) -> Any:
        calls.append(1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == full and len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            return save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    checkpoint._save_engine = limited
    try:
        run(config(Path(folder), *overrides))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        checkpoint._save_engine = save
    return "no error"


@pytest.mark.parametrize("full", [pytest.param(0, marks=pytest.mark.deep), pytest.param(1, marks=pytest.mark.deep)])
def test_a_full_disk_on_any_rank_is_named_on_all_and_older_checkpoints_stay(tmp_path: Path, full: int) -> None:
    write(tmp_path)
    answers = run_ranks(2, train_with_a_full_disk, str(tmp_path), (), full, timeout=LIMIT)
    assert all(answer.startswith("CheckpointError: the checkpoint could not be written") for answer in answers), answers
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"latest", "step-00000002"}
    assert run_ranks(2, train, str(tmp_path), ("checkpoint.resume=must",), timeout=LIMIT) == [0, 0]
    assert len(losses(tmp_path / "run")) == 6


def resume(rank: int, world: int, folder: str, steps: int) -> str:
    try:
        run(config(Path(folder), f"train.steps={steps}", "train.schedule=constant", "checkpoint.keep=3"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_damaged_checkpoints_are_passed_over_and_payloads_refused(tmp_path: Path) -> None:
    write(tmp_path)
    expected = tmp_path / "expected"
    assert run_ranks(2, resume, str(tmp_path), 6, timeout=LIMIT) == ["no error"] * 2
    whole = losses(tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"

    # one flipped bit in rank 1's file of the newest: the one before is used, and the steps come out the same
    newest = root / "step-00000006"
    victim = newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    assert run_ranks(2, resume, str(tmp_path), 6, timeout=LIMIT) == ["no error"] * 2
    assert losses(tmp_path / "run") == whole
    manifest.verify_files(newest, manifest.read_manifest(newest))

    # a payload whose manifest is right: refused by all ranks, not run, and no older one is taken behind one's back
    trace = tmp_path / "ran"
    torch.save({"module": Payload(trace)}, victim)
    found = manifest.read_manifest(newest)
    entry = dataclasses.replace(
        next(entry for entry in found.files if entry.path == victim.name),
        bytes=victim.stat().st_size,
        sha256=durable.sha256_of(victim),
    )
    others = [entry for entry in found.files if entry.path != victim.name]
    manifest.write_manifest(newest, dataclasses.replace(found, files=(*others, entry)))
    answers = run_ranks(2, resume, str(tmp_path), 8, timeout=LIMIT)
    assert all(f"{victim.name}: refused" in answer for answer in answers), answers
    assert not trace.exists() and not expected.exists()

    # nothing valid left: never a silent start from nothing
    for path in root.glob("step-*/manifest.json"):
        path.write_text("{}")
    answers = run_ranks(2, resume, str(tmp_path), 8, timeout=LIMIT)
    assert all("none of 3 checkpoints is valid" in answer for answer in answers), answers


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {self.trace}",))


CONTRADICTIONS = {
    "zero.stage=1": "zero.stage 3, this run has 1",
    "data.seed=5": "data.seed 0, this run has 5",
    "model.layers=3": "model.layers 2, this run has 3",
    "data.sequence_length=64": "data.sequence_length 96, this run has 64",
    "checkpoint.resume=never": "checkpoint.resume is never",
}


def contradict(rank: int, world: int, folder: str) -> list[str]:
    answers = []
    for override in CONTRADICTIONS:
        try:
            answers.append(str(run(config(Path(folder), override))))
        except Exception as error:
            answers.append(str(error))
    return answers


@pytest.mark.deep
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    run_ranks(2, train, str(tmp_path), ("train.steps=2", "output.sample_tokens=0"), timeout=LIMIT)
    for answers in run_ranks(2, contradict, str(tmp_path), timeout=LIMIT):
        for answer, named in zip(answers, CONTRADICTIONS.values(), strict=True):
            assert named in answer and "another output.folder" in answer


def fail(rank: int, world: int, folder: str, override: str) -> str:
    try:
        run(config(Path(folder), override))
    except LongctxError as error:
        return str(error)
    return "no error"


def test_data_that_cannot_be_used_and_a_folder_in_use_are_named_on_all_ranks(tmp_path: Path) -> None:
    write(tmp_path)
    noise, tokens = tmp_path / "noise.txt", tmp_path / "tokens"
    noise.write_bytes(bytes(range(256)) * 40)
    (tmp_path / "blank.txt").write_text(" \n")
    build_tokens(str(tmp_path / "text"), "bpe", tokens, vocabulary_size=300, held_out=0.2)
    mistakes = {
        f"data.sources={noise}": "binary",
        f"data.sources={tmp_path / 'blank.txt'}": "blank.txt is empty",
        f"data.sources={tokens}": "was not built with data.tokenizer 'bytes'",
    }
    for override, named in mistakes.items():
        answers = run_ranks(2, fail, str(tmp_path), override, timeout=LIMIT)
        assert all(named in answer for answer in answers), answers
    with FolderLock(tmp_path / "run"):
        answers = run_ranks(2, fail, str(tmp_path), "train.steps=2", timeout=LIMIT)
        assert all(f"in use by another run (process {os.getpid()} on" in answer for answer in answers), answers


@pytest.mark.deep
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    write(tmp_path)
    explode = ("train.optimizer=sgd", "train.lr=1000", "train.clip=null", "train.warmup_steps=0", "train.steps=50")
    with pytest.raises(RankFailure, match="NonFiniteError") as failure:
        run_ranks(2, train, str(tmp_path), (*explode, "checkpoint.every=1"), timeout=LIMIT)
    done = len(losses(tmp_path / "run"))
    assert f"It was step {done + 1}, samples {done} to {done}, rows " in str(failure.value)
    # the last checkpoint is the last good step's
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:08d}" / "manifest.json").is_file()

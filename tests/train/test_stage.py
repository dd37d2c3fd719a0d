"""Stages: rows of several lengths in one run, each as if it were alone; resumed in any of them to the last bit."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from house_files import ROOT
from tiny_run import config, losses, weights, write

from longctx.config.load import loads
from longctx.config.stages import stages_of
from longctx.data.tokens.file import TokenFile
from longctx.errors import CheckpointError
from longctx.mesh import Mesh
from longctx.train.corpus import prepare_corpus
from longctx.train.job import stage_of
from longctx.train.loop import Loop
from longctx.train.run import run
from longctx.train.stage import begin_stage, training_stages

from distributed import run_ranks

LIMIT = 280.0
YARN = "rope: {rope_type: yarn, factor: 2, original_max_position_embeddings: 96}"
STAGES = (
    "train.steps=null",
    "data.sequence_length=null",
    "train.stages=[{sequence_length: 32, steps: 2, global_batch: 2}, {sequence_length: 96, steps: 2, lr: 0.005}, "
    f"{{sequence_length: 192, steps: 2, micro_batch: 2, global_batch: 2, {YARN}}}]",
)


def train(rank: int, world: int, folder: str, name: str, overrides: tuple[str, ...], stop_at: int = 0) -> int:
    settings = config(Path(folder), *overrides, name=name)
    step = Loop._step

    def signalled(loop: Loop) -> dict[str, Any]:
        if rank == 1 and loop.outcome.progress.step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(loop)

    Loop._step = signalled  # type: ignore[method-assign]
    try:
        return run(settings)
    finally:
        Loop._step = step  # type: ignore[method-assign]


ZERO3_BF16 = pytest.param(("zero.stage=3", "model.dtype=bf16"), (4,), id="zero3-bf16", marks=pytest.mark.deep)


@pytest.mark.parametrize(
    ("overrides", "stops"),
    [
        pytest.param(("zero.stage=2",), (3,), id="zero2"),
        pytest.param(("zero.stage=3",), (1, 2, 4, 5), id="zero3-every-place", marks=pytest.mark.deep),
        pytest.param(("zero.stage=0",), (5,), id="zero0", marks=pytest.mark.deep),
        ZERO3_BF16,
    ],
)
def test_resumed_in_a_stage_equals_uninterrupted(
    tmp_path: Path, overrides: tuple[str, ...], stops: tuple[int, ...]
) -> None:
    """Within a stage and at its ends; the last one has other positions and other batches."""
    write(tmp_path, "straight")
    overrides = (*STAGES, *overrides)
    assert run_ranks(2, train, str(tmp_path), "straight", overrides, timeout=LIMIT) == [0, 0]
    records = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["sequence_length"]) for record in records] == [
        (1, 32), (1, 32), (2, 96), (2, 96), (3, 192), (3, 192),
    ]  # fmt: skip
    exported = json.loads((tmp_path / "straight" / "model" / "config.json").read_text())
    assert exported["rope_parameters"]["factor"] == 2.0 and exported["max_position_embeddings"] == 192
    for stop in stops:
        name = f"broken-{stop}"
        write(tmp_path, name)
        assert run_ranks(2, train, str(tmp_path), name, overrides, stop, timeout=LIMIT) == [75, 75]
        again = (*overrides, "checkpoint.resume=must")
        assert run_ranks(2, train, str(tmp_path), name, again, timeout=LIMIT) == [0, 0]
        assert losses(tmp_path / name) == losses(tmp_path / "straight")
        straight, broken = weights(tmp_path / "straight"), weights(tmp_path / name)
        assert all(torch.equal(straight[key], broken[key]) for key in straight)


@pytest.mark.parametrize("long", ["split", "truncate", "drop"])
def test_long_documents_are_what_the_yaml_says(tmp_path: Path, long: str) -> None:
    write(tmp_path)
    settings = config(tmp_path, "mesh.ring=1", "data.sequence_length=100", f"data.long_documents={long}")
    corpus = prepare_corpus(settings, lambda text: None)
    (stage,) = training_stages(settings, 1, Mesh(world_size=1), corpus)
    report, tokens = corpus.report, stage.loader.rows.token_count
    left_out = {"split": 0, "truncate": report["tokens_beyond_row"], "drop": report["longer_than_row_tokens"]}[long]
    assert report["longer_than_row"] and tokens == report["tokens"] - left_out
    assert stage.held_out is not None and stage.held_out.rows.long_documents == long


def test_each_stage_reads_its_own_rows(tmp_path: Path) -> None:
    write(tmp_path)
    settings = config(tmp_path, *STAGES, "mesh.ring=1", "output.folder=" + str(tmp_path / "run"))
    corpus = prepare_corpus(settings, lambda text: None)
    stages = training_stages(settings, 1, Mesh(world_size=1), corpus)
    shapes = [[tuple(batch["input_ids"].shape) for batch in next(stage.loader)] for stage in stages]
    assert shapes == [[(1, 32), (1, 32)], [(1, 96)], [(2, 192)]]
    assert [(stage.first, stage.last) for stage in stages] == [(1, 2), (3, 4), (5, 6)]
    assert [stage_of(stages, step).number for step in (1, 2, 3, 6, 7)] == [0, 0, 1, 2, 2]
    kinds = [stage.description.rope_parameters["rope_type"] for stage in stages]
    assert kinds == ["default", "default", "yarn"]
    assert {stage.description.max_position_embeddings for stage in stages} == {192}
    with TokenFile(corpus.train) as tokens:
        for stage in stages:
            fill = sum(stage.loader.rows.pieces(row)[1].fill for row in range(len(stage.loader.rows)))
            assert fill == tokens.token_count
            stage.loader.close()


def test_a_stage_sets_batch_and_rope() -> None:
    from models.zoo import tiny_config, tiny_model

    from longctx.models.attach import attach_attention

    model = tiny_model(tiny_config("llama"), "longctx")
    attach_attention(model, Mesh(world_size=1))
    said: list[str] = []
    engine: Any = SimpleNamespace(module=model, calls=[])
    engine.set_train_micro_batch_size = lambda rows: engine.calls.append(("micro", rows))
    engine.set_train_batch_size = lambda rows: engine.calls.append(("all", rows))
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    sizes = SimpleNamespace(micro_batch=2, global_batch=8)
    stage: Any = SimpleNamespace(sizes=sizes, description=tiny_config("llama", rope_parameters=rope))
    before = model.model.rotary_emb.inv_freq.clone()
    begin_stage(engine, stage, said.append)
    assert engine.calls == [("micro", 2), ("all", 8)]
    assert torch.equal(model.model.rotary_emb.inv_freq, before / 4) and model.config.rope_parameters == rope


def test_a_run_continues_with_longer_rows(tmp_path: Path) -> None:
    """What is past must stay as it was; later stages may be added."""
    write(tmp_path)
    alone = ("mesh.ring=1", "checkpoint.every=0", "output.sample_tokens=0", "train.eval_every=0")
    assert run_ranks(1, train, str(tmp_path), "run", (*alone, "train.steps=2"), timeout=LIMIT) == [0]
    unset = ("train.steps=null", "data.sequence_length=null")
    longer = "train.stages=[{sequence_length: 96, steps: 2}, {sequence_length: 192, steps: 1}]"
    assert run_ranks(1, train, str(tmp_path), "run", (*alone, *unset, longer), timeout=LIMIT) == [0]
    assert len(losses(tmp_path / "run")) == 3
    other = "train.stages=[{sequence_length: 96, steps: 1}, {sequence_length: 192, steps: 3}]"
    with pytest.raises(CheckpointError, match=r"after stages of \(steps, tokens per row\) \(2, 96\), \(1, 192\), but"):
        run(config(tmp_path, *alone, *unset, other))


def test_stages_of_a_plain_run(tmp_path: Path) -> None:
    write(tmp_path)
    settings = config(tmp_path)
    (stage,) = stages_of(settings)
    assert stage.config is settings and (stage.first, stage.last) == (1, 6)


def documented(rank: int, world: int, text: str, folder: str) -> int:
    return run(loads(text, [f"output.folder={folder}", "mesh.ring=1", "output.plot=false"]).config)


def test_the_block_of_the_page_is_trained(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert run_ranks(1, documented, block, str(tmp_path / "run"), timeout=LIMIT) == [0]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["sequence_length"] for record in records] == [256] * 10 + [1024] * 4
    assert records[-1]["loss"] < records[0]["loss"]

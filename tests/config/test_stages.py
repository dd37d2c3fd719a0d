"""`train.stages`: what follows from them, and mistakes under the stage's own key."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import load_variant, problems_of, text_of, variant

from longctx.config.load import loads
from longctx.config.stages import fill_in, model_of, stage_at, stages_of, whole
from longctx.config.write import dump

UNSET: dict[str, Any] = {"train__steps": ..., "data__sequence_length": ..., "train__global_batch": ...}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
TWO = [{"sequence_length": "2Ki", "steps": 10}, {"sequence_length": "8Ki", "steps": 20, "lr": 0.01, "rope": YARN}]


def told(stages: Any, **changes: Any) -> list[tuple[str, str]]:
    error = problems_of(text_of(variant(**{**UNSET, "train__stages": stages, **changes})))
    return [(problem.key, problem.message) for problem in error.problems]


def test_stages_in_order() -> None:
    config = load_variant(**UNSET, train__stages=TWO).config
    assert (config.train.steps, config.data.sequence_length) == (30, 8192)
    first, second = stages_of(config)
    assert (first.first, first.last, second.first, second.last) == (1, 10, 11, 30)
    assert first.config.data.sequence_length == 2048 and first.config.train.lr == 0.001
    assert second.config.train.lr == 0.01 and second.config.train.steps == 30 and second.config.train.stages == ()
    assert [stage_at(config, step).number for step in (1, 10, 11, 99)] == [0, 0, 1, 1]
    assert first.config.model.rope is None and whole(config).model.rope == second.config.model.rope
    assert model_of(config, second).data.sequence_length == 8192 and model_of(config, first).model.rope is None
    assert loads(dump(config)).config == config


def test_a_run_without_stages_is_one() -> None:
    config = load_variant().config
    (only,) = stages_of(config)
    assert only.config is config and only.last == config.train.steps and whole(config) == config


def test_totals_are_filled_in_or_must_agree() -> None:
    tree: dict[str, Any] = {"train": {"stages": [{"sequence_length": 8, "steps": 2}, {"steps": 3}]}, "data": {}}
    fill_in(tree)
    assert tree["train"]["steps"] == 5 and not isinstance(tree["data"]["sequence_length"], int)
    assert told(TWO, train__steps=70) == [
        ("train.steps", "got 70, but train.stages have 30 steps in all; remove the key")
    ]
    ((key, message),) = told(TWO, data__sequence_length=4096)
    assert key == "data.sequence_length" and "the longest of train.stages is 8192" in message


@pytest.mark.parametrize(
    ("stage", "key", "message"),
    [
        ({"sequence_length": 2}, "steps", "is missing; expected a whole number"),
        ({"sequence_length": 2048, "steps": 0}, "steps", "got 0; expected a whole number at least 1"),
        ({"seq_len": 2048, "steps": 1}, "seq_len", "did you mean 'sequence_length'?"),
        ({"sequence_length": 2, "steps": 1}, "sequence_length", "needs rows of at least 4 tokens"),
        (
            {"sequence_length": 2048, "steps": 1, "global_batch": 3},
            "global_batch",
            "is not a multiple of micro_batch 1",
        ),
        ({"sequence_length": 2048, "steps": 1, "rope": {"factor": 2}}, "rope.rope_type", "is missing"),
        (
            {"sequence_length": 4096, "steps": 1, "rope": {**YARN, "factor": 1.5}},
            "rope.factor",
            "extends 2,048 positions to 3,072, but rows have 4,096",
        ),
    ],
)
def test_mistakes_of_a_stage(stage: dict[str, Any], key: str, message: str) -> None:
    found = told([TWO[0], stage, TWO[1]])
    assert [said for name, said in found if name == f"train.stages[1].{key}" and message in said], found


@pytest.mark.parametrize("stages", [3, [3], ["x"], {"steps": 1}])
def test_what_is_no_list_of_stages(stages: Any) -> None:
    assert told(stages)[0][0] in ("train.stages", "train.stages[0]")

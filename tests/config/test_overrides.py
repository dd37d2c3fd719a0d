"""Overrides are typed by the schema, stronger than the file, and refused by name when wrong."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import BASE, problems_of, text_of

from longctx.config.load import load_with_sources, loads

GOOD = text_of(BASE)

ACCEPTED: list[tuple[str, str, Any]] = [
    ("train.steps=200", "train.steps", 200),
    ("train.steps=1_000", "train.steps", 1000),
    ("train.steps=2k", "train.steps", 2000),
    ("train.lr=1e-4", "train.lr", 1e-4),
    ("train.lr=3", "train.lr", 3.0),
    ("train.clip=null", "train.clip", None),
    ("train.clip=", "train.clip", None),
    ("train.betas=[0.8, 0.99]", "train.betas", (0.8, 0.99)),
    ("train.deterministic=true", "train.deterministic", True),
    ("data.sources=text/", "data.sources", ("text/",)),
    ("data.sources=[a.txt, b.txt]", "data.sources", ("a.txt", "b.txt")),
    ("data.sources=2024", "data.sources", ("2024",)),
    ("data.sequence_length=8Ki", "data.sequence_length", 8192),
    ("output.folder=2024", "output.folder", "2024"),
    ("output.folder=true", "output.folder", "true"),
    ("output.folder=0123", "output.folder", "0123"),
    ("output.folder=a=b", "output.folder", "a=b"),
    ("output.folder='quoted name'", "output.folder", "quoted name"),
    ("mesh.ring=auto", "mesh.ring", "auto"),
    ("model.extra.rope_theta=1e6", "model.extra", {"rope_theta": 1e6}),
    ("model.extra={attention_bias: true}", "model.extra", {"attention_bias": True}),
    (
        "deepspeed.zero_optimization.reduce_bucket_size=1000",
        "deepspeed",
        {"zero_optimization": {"reduce_bucket_size": 1000}},
    ),
]
REFUSED = [
    ("train.steps=0123", "leading zero"),
    ("train.stepz=1", "train.steps"),
    ("train.learning_rate=1", "train.lr"),
    ("trian.lr=1", "train.lr"),
    ("steps=1", "train.steps"),
    ("sequence_length=1", "data.sequence_length"),
    ("zero.stages=1", "zero.stage"),
    ("train=5", "train.steps"),
    ("train.lr.x=1", "takes a value"),
    ("train.lr", "section.key=value"),
    ("=1", "section.key=value"),
    ("--lr=1", "train.lr"),
    ("train..lr=1", "section.key=value"),
    ("train.lr=fast", "a number"),
    ("train.steps=1.5", "whole number"),
    ("train.optimizer=adam", "'adamw'"),
    ("train.deterministic=yes", "'true'"),
    ("train.lr=[1", "YAML"),
    ("train.lr=!!python/name:os.system", "tag"),
    ("train.lr=.nan", "a number"),
    ("model.hidden_size=" + "[" * 1000, "nested deeper"),
    ("deepspeed.train_batch_size=8", "train.global_batch"),
    ("model.extra.auto_map.x=1", "refused"),
]


def test_there_are_at_least_thirty_cases():
    assert len(ACCEPTED) + len(REFUSED) >= 30


@pytest.mark.parametrize(("override", "key", "value"), ACCEPTED)
def test_accepted(override: str, key: str, value: Any):
    loaded = loads(GOOD, [override], name="run.yaml")
    found: Any = loaded.config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)
    if key in loaded.sources:  # raw blocks keep the place of the inner key
        assert str(loaded.sources[key]).startswith(f"override {key}")


@pytest.mark.parametrize(("override", "named"), REFUSED)
def test_refused_by_name(override: str, named: str):
    error = problems_of(GOOD, override)
    assert len(error.problems) == 1 and named in str(error), str(error)
    assert str(error.problems[0].place).startswith("override ")


def test_the_last_of_two_wins_and_the_file_loses():
    config = loads(GOOD, ["train.lr=1", "train.lr=2"]).config
    assert config.train.lr == 2.0 and config.train.steps == BASE["train"]["steps"]


def test_an_override_mends_a_wrong_value_in_the_file():
    assert loads(GOOD.replace("steps: 100", "steps: soon"), ["train.steps=50"]).config.train.steps == 50


def test_a_section_that_the_file_does_not_have():
    text = text_of({name: block for name, block in BASE.items() if name != "zero"})
    assert loads(text, ["zero.stage=1"]).config.zero.stage == 1


def test_bad_overrides_are_reported_with_the_mistakes_of_the_file():
    error = problems_of(GOOD.replace("steps: 100", "steps: soon"), "train.lr=x", "bogus.key=1")
    assert [problem.key for problem in error.problems][0] == "train.steps" and len(error.problems) == 3


def test_sources_say_file_override_or_default(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    loaded = load_with_sources(path, ["train.lr=0.5"])
    assert str(loaded.sources["train.lr"]) == "override train.lr"
    assert str(loaded.sources["train.steps"]).startswith(f"{path}:")
    assert "train.seed" not in loaded.sources

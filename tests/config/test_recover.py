"""A YAML with errors of syntax: the blocks that parse are read, at their own lines; the others are problems."""

from __future__ import annotations

import pytest

from longctx.config.problems import InvalidConfig, Location
from longctx.config.recover import parse_or_recover
from longctx.config.strict_yaml import parse

GOOD = "model:\n  layers: 2\n  heads: 4\ntrain:\n  steps: 3\n"


def test_a_text_that_parses_is_only_parsed() -> None:
    assert parse_or_recover(GOOD, "f") == parse(GOOD, "f")


@pytest.mark.parametrize(
    ("wrong", "key", "value"),
    [
        ("  layers: [2", "model.layers", {"model": {"heads": 4}, "train": {"steps": 3}}),
        ("  layers: !x 2", "model.layers", {"model": {"heads": 4}, "train": {"steps": 3}}),
        ("\tlayers: 2", "model.layers", {"model": {"heads": 4}, "train": {"steps": 3}}),
        ("  layers: *a", "model.layers", {"model": {"heads": 4}, "train": {"steps": 3}}),
        ("  - 2", "model", {"train": {"steps": 3}}),  # no key of it is wrong by itself
    ],
)
def test_the_smallest_block_that_does_not_parse_is_left_out(wrong: str, key: str, value: object) -> None:
    document = parse_or_recover(GOOD.replace("  layers: 2", wrong), "f")
    assert [problem.key for problem in document.problems] == [key] and document.value == value
    assert document.values[("train", "steps")] == Location("f", 5, 10)


def test_every_block_that_does_not_parse_is_a_problem() -> None:
    document = parse_or_recover(GOOD.replace("heads: 4", "heads: {4").replace("steps: 3", "steps: 'a"), "f")
    assert [problem.key for problem in document.problems] == ["model.heads", "train.steps"]
    assert document.value == {"model": {"layers": 2}, "train": None}


def test_an_alias_to_a_block_that_parses_is_no_mistake() -> None:
    text = "model: {extra: &a {b: 1}}\ndeepspeed: *a\ntrain: [\n"
    document = parse_or_recover(text, "f")
    assert [problem.key for problem in document.problems] == ["train"] and document.value["deepspeed"] == {"b": 1}


@pytest.mark.parametrize("text", ["a: [1", "model: 1\n---\ntrain: [", "model: [\n", "\x00" + GOOD, "x" * 40_000])
def test_what_cannot_be_recovered_is_the_error_of_the_whole_text(text: str) -> None:
    with pytest.raises(InvalidConfig) as whole:
        parse(text, "f")
    if text == "model: [\n":
        assert parse_or_recover(text, "f").value == {}
        return
    with pytest.raises(InvalidConfig) as caught:
        parse_or_recover(text, "f")
    assert caught.value.problems == whole.value.problems

"""Rules over a configuration in which some values are unknown."""

from __future__ import annotations

from collections.abc import Iterator

from config_samples import load_variant

from longctx.config.findings import Finding, judge
from longctx.config.partial import without
from longctx.config.schema import RunConfig


def first_lr_then_steps(config: RunConfig) -> Iterator[Finding]:
    yield Finding("train.lr", str(config.train.lr), "one")
    yield Finding("train.steps", str(config.train.steps), "two")


def only_clip(config: RunConfig) -> Iterator[Finding]:
    yield Finding("train.clip", str(config.train.clip), "three")


def test_a_rule_ends_at_an_unknown_value_and_keeps_what_it_found() -> None:
    config = load_variant().config
    rules = [first_lr_then_steps, only_clip]
    assert [finding.code for finding in judge(rules, config)] == ["one", "two", "three"]
    assert [finding.code for finding in judge(rules, without(config, {"train.steps"}))] == ["one", "three"]
    assert [finding.code for finding in judge(rules, without(config, {"train.lr"}))] == ["three"]

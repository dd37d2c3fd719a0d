"""The stages of a run, each as a configuration of its own, and rules judged for every one of them.

A run without `train.stages` has one stage, which is the configuration itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from longctx.config.fields import UnknownValue, human_int
from longctx.config.findings import Finding, Rule, judge
from longctx.config.schema import RunConfig
from longctx.config.sections.rope import RopeSection
from longctx.config.tidy import Unread

_OWNERS = {
    "data.sequence_length": "sequence_length",
    "train.global_batch": "global_batch",
    "train.micro_batch": "micro_batch",
    "train.lr": "lr",
    "model.rope": "rope",
}
"""key of a run -> key of a stage that takes its place"""


class RunStage(NamedTuple):
    """Consecutive optimizer steps on rows of one length."""

    number: int
    """from 0"""
    first: int
    """its first optimizer step, from 1"""
    last: int
    config: RunConfig
    """the run as if this were its only stage; `train.steps` counts all stages"""


class HasConfig(Protocol):
    """A stage, as far as ``model_of`` reads it."""

    @property
    def config(self) -> RunConfig:
        """The run as if the stage were its only one."""
        ...


def stages_of(config: RunConfig) -> tuple[RunStage, ...]:
    """Return the stages of a run in order."""
    given, done, found = config.train.stages, 0, []
    for number, stage in enumerate(given):
        own = {
            key: value for key in ("global_batch", "micro_batch", "lr") if (value := getattr(stage, key)) is not None
        }
        update = {
            "model": config.model.model_copy(update={"rope": stage.rope or config.model.rope}),
            "data": config.data.model_copy(update={"sequence_length": stage.sequence_length}),
            "train": config.train.model_copy(update={"stages": (), **own}),
        }
        found.append(RunStage(number, done + 1, done + stage.steps, config.model_copy(update=update)))
        done += stage.steps
    return tuple(found) or (RunStage(0, 1, config.train.steps, config),)


def stage_at(config: RunConfig, step: int) -> RunStage:
    """Return the stage that optimizer step ``step`` (from 1) belongs to; the last one for later steps."""
    found = stages_of(config)
    return next((stage for stage in found if step <= stage.last), found[-1])


def whole(config: RunConfig) -> RunConfig:
    """Return the configuration of the model that the run ends with: `model.rope` is that of the last stage."""
    rope = stages_of(config)[-1].config.model.rope
    return config.model_copy(update={"model": config.model.model_copy(update={"rope": rope})})


def model_of(config: RunConfig, stage: HasConfig) -> RunConfig:
    """Return the configuration of the model in a stage: its rope, for the longest row of the run."""
    return config.model_copy(update={"model": stage.config.model})


def judge_run(rules: Iterable[Rule], config: RunConfig) -> list[Finding]:
    """Return the findings of every rule for the whole run, and for each stage those about keys of its own."""
    rules = list(rules)
    try:
        stages, run = (stages_of(config), whole(config)) if config.train.stages else ((), config)
    except UnknownValue:
        return judge(rules, config)
    found = judge(rules, run)
    told = {finding.message for finding in found}
    for stage in stages:
        for finding in judge(rules, stage.config):
            own = _in_stage(finding, stage, config)
            if own is not None and finding.message not in told:
                found.append(own)
    return found


def fill_in(tree: dict[str, Any]) -> None:
    """Set `train.steps` and `data.sequence_length` from the stages where they are not given, in place."""
    train, data = tree.get("train"), tree.get("data")
    stages = train.get("stages") if isinstance(train, dict) else None
    if not stages or not isinstance(train, dict) or not isinstance(data, dict):
        return
    for block, key, total in ((train, "steps", sum), (data, "sequence_length", max)):
        blocks = stages if isinstance(stages, list) else [None]
        values: list[Any] = [human_int(stage.get(key)) if isinstance(stage, dict) else None for stage in blocks]
        if block.get(key) is None:  # a wrong stage is reported once, under its own key
            block[key] = total(values) if all(type(value) is int for value in values) else Unread()


def _in_stage(finding: Finding, stage: RunStage, config: RunConfig) -> Finding | None:
    """Return a finding under the stage's own key; None if it is about a key that the stage does not set."""
    section = config.train.stages[stage.number]
    for key, own in _OWNERS.items():
        inside = finding.key == key or finding.key.startswith(f"{key}.")
        if inside and getattr(section, own) is not None:
            name = f"train.stages[{stage.number}].{own}{finding.key.removeprefix(key)}"
            return finding._replace(key=name)
    return None


def _steps(config: RunConfig) -> Iterator[Finding]:
    stages, steps = config.train.stages, config.train.steps
    total = sum(stage.steps for stage in stages)
    if stages and steps != total:
        message = f"got {steps}, but train.stages have {total} steps in all; remove the key"
        yield Finding("train.steps", message, "stages")


def _longest(config: RunConfig) -> Iterator[Finding]:
    lengths = [stage.sequence_length for stage in config.train.stages]
    if lengths and config.data.sequence_length != max(lengths):
        message = (
            f"got {config.data.sequence_length}, but the longest of train.stages is {max(lengths)}; remove the key"
        )
        yield Finding("data.sequence_length", message, "stages")


def ropes(config: RunConfig) -> list[RopeSection]:
    """Return the rope blocks of the run's stages, [] if no stage has its own."""
    return [stage.rope for stage in config.train.stages if stage.rope is not None]


RULES: tuple[Rule, ...] = (_steps, _longest)

"""What a rule finds wrong, and how rules are run over a configuration of which some keys are unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from longctx.config.fields import UnknownValue
from longctx.config.schema import RunConfig


class Finding(NamedTuple):
    """A broken rule: the key to change, what is wrong and what to write instead, and a code."""

    key: str
    message: str
    code: str


Rule = Callable[[RunConfig], Iterator[Finding]]


def judge(rules: Iterable[Rule], config: RunConfig) -> list[Finding]:
    """Return the findings of every rule.

    A rule that reads a key whose value is not known (see `partial.without`) ends there: it would judge a value that
    the user has not given. So every independent check is a rule of its own.
    """
    findings: list[Finding] = []
    for rule in rules:
        try:
            for finding in rule(config):
                findings.append(finding)  # noqa: PERF402 - what was found before an unknown key is kept
        except UnknownValue:
            continue
    return findings

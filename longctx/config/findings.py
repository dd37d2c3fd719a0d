"""What rules find wrong, and how they run over a configuration in which some values are unknown."""

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

    A rule that reads an unknown value (see `partial.without`) stops there: it would judge a value that the user did
    not give. So each independent check is a separate rule.
    """
    findings: list[Finding] = []
    for rule in rules:
        try:
            for finding in rule(config):
                findings.append(finding)  # noqa: PERF402 - what was found before an unknown key is kept
        except UnknownValue:
            continue
    return findings

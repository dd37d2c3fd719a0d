"""`make test` runs something of every test file; `deep` and `slow` only take cases out of it (tests/README.md)."""

from __future__ import annotations

from collections import defaultdict

import pytest

ELSEWHERE = {"aot", "gpu", "hosts"}  # what needs another machine, or a target of its own
TIERS = {"deep", "slow"}
# A file of one long test: another file exercises the same code in `make test`.
WHOLE_FILES = {
    "tests/engine/test_universal.py": "converts checkpoints with DeepSpeed's script; test_save.py writes them",
    "tests/train/test_mixed_run.py": "whole runs; tests/data mixes sources, test_resume.py resumes",
    "tests/train/test_hybrid.py": "a whole run; test_parity.py trains with ulysses",
}


def tier(item: pytest.Item) -> str:
    marks = {mark.name for mark in item.iter_markers()} & (TIERS | ELSEWHERE)
    return "other" if marks & ELSEWHERE else "".join(sorted(marks)) or "test"


def test_every_file_keeps_a_test(all_items: list[pytest.Item]) -> None:
    tiers = defaultdict(set)
    for item in all_items:
        tiers[item.nodeid.split("::")[0]].add(tier(item))
    without = sorted(
        file for file, found in tiers.items() if found & TIERS and "test" not in found and file not in WHOLE_FILES
    )
    assert not without, f"`make test` runs nothing of these: {without}"


def test_no_test_is_in_two_tiers(all_items: list[pytest.Item]) -> None:
    both = [item.nodeid for item in all_items if tier(item) == "deepslow"]
    assert not both, f"`make test-deep` and `make test-slow` would both run these: {both}"

"""All kernels but flash's, compiled for chips that are not here: nothing spilled, shared memory within the chip's,
tensor cores used where there are products. As test_aot.py: what changed since the record and a little of the rest in
every run, all by `make test-aot`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import kernel_aot as aot
import kernel_aot_others as others
import pytest
from house_files import ROOT

OPERATORS = sorted(others.SOURCES)


def recorded(operator: str) -> dict[str, aot.Compiled]:
    return {entry["case"]: aot.Compiled(**entry) for entry in json.loads(others.record(operator).read_text())}


def compiled(cases: list[others.Case]) -> list[str]:
    """Compile in a process without the interpreter; returns what is wrong."""
    done = subprocess.run(
        [sys.executable, str(Path(others.__file__)), *map(str, cases)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, text=True, check=False,
        capture_output=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), done.stderr[-3000:]
    wrong = []
    for entry in map(json.loads, lines):
        bad = "error" in entry
        wrong += [f"{entry['case']}: {entry['error']}"] if bad else others.problems(aot.Compiled(**entry))
    return wrong


def turn() -> int:
    """A number that changes with every commit."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return zlib.crc32(done.stdout.encode())


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_record_is_complete_and_good(operator: str) -> None:
    record = recorded(operator)
    assert set(record) == {str(case) for case in others.cases(operator)}
    assert not [problem for entry in record.values() for problem in others.problems(entry)]


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_changed_and_a_little_of_the_rest(operator: str) -> None:
    record, now = recorded(operator), turn()
    cases = [
        case for case in others.cases(operator)
        if record[str(case)].hash != case.hash or (zlib.crc32(str(case).encode()) + now) % 32 == 0
    ]  # fmt: skip
    assert not compiled(cases)


@pytest.mark.aot
@pytest.mark.parametrize("operator", OPERATORS)
def test_everything(operator: str) -> None:
    cases = list(others.cases(operator))
    assert not compiled(cases)
    record = recorded(operator)
    stale = [str(case) for case in cases if record[str(case)].hash != case.hash]
    assert not stale, "run tests/kernel_aot_others.py --record"

"""Every configuration the chooser can return, compiled for its chip: nothing spilled, shared memory within the chip's,
tensor cores used. The results are recorded beside the kernels; what changed since, and a tenth of the rest, is compiled
by `make test-deep`, everything by `make test-aot`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import kernel_aot as aot
import pytest
from house_files import ROOT

from longctx.kernels.flash import tiles


def recorded() -> dict[str, aot.Compiled]:
    return {entry["case"]: aot.Compiled(**entry) for entry in json.loads(aot.RECORD.read_text())}


def compiled(cases: list[aot.Case]) -> list[str]:
    """Compile in processes without the interpreter, two at a time; returns what is wrong."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    halves = [cases[0::2], cases[1::2]]
    running = [
        subprocess.Popen(
            [sys.executable, str(Path(aot.__file__)), *map(str, half)],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for half in halves if half
    ]  # fmt: skip
    lines, said = [], ""
    for process in running:
        out, errors = process.communicate()
        lines += out.splitlines()
        said += errors
    assert len(lines) == len(cases), said[-3000:]
    wrong = []
    for entry in map(json.loads, lines):
        wrong += [f"{entry['case']}: {entry['error']}"] if "error" in entry else aot.problems(aot.Compiled(**entry))
    return wrong


def commit() -> int:
    """A number that changes with every commit: the tenth that is compiled moves on, and is the same when run again."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return zlib.crc32(done.stdout.encode())


def test_the_chooser_has_few_configurations() -> None:
    for arch in tiles.ARCHES:
        made = [case for case in aot.cases() if case.arch == arch]
        assert len(made) <= 32, "each is compiled for this chip"


def test_the_record_is_complete_and_good() -> None:
    record = recorded()
    assert set(record) == {str(case) for case in aot.cases()}
    assert not [problem for entry in record.values() for problem in aot.problems(entry)]


@pytest.mark.deep
def test_what_changed_and_a_tenth_of_the_rest() -> None:
    record, turn = recorded(), commit()
    cases = [
        case for case in aot.cases()
        if record[str(case)].hash != case.hash or (zlib.crc32(str(case).encode()) + turn) % 10 == 0
    ]  # fmt: skip
    assert not compiled(cases)


@pytest.mark.aot
@pytest.mark.parametrize("arch", tiles.ARCHES)
def test_everything(arch: str) -> None:
    cases = [case for case in aot.cases() if case.arch == arch]
    assert not compiled(cases)
    record = recorded()
    assert not [str(case) for case in cases if record[str(case)].hash != case.hash], "run tests/kernel_aot.py --record"

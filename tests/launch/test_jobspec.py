"""The job spec: private, unchanged by the round trip, rejected when damaged."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from launch_samples import HOSTILE, make_spec

from longctx.errors import LaunchError
from longctx.launch.cluster import jobspec


def test_a_job_spec_is_private_and_arrives_unchanged(tmp_path: Path) -> None:
    environment = {f"NAME_{number}": text for number, text in enumerate(HOSTILE)}
    given_spec = make_spec(tmp_path, environment=environment, command=("a", *HOSTILE))
    folder = tmp_path / "private"
    jobspec.make_private(folder)
    path = folder / "ticket.json"
    path.symlink_to(tmp_path / "elsewhere")  # planted: replaced, not followed
    jobspec.save(given_spec, path)
    assert jobspec.load(path) == given_spec and not (tmp_path / "elsewhere").exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [given_spec.seat(rank) for rank in range(3)] == [("a", 0, 2), ("a", 1, 2), ("b", 0, 1)]
    path.chmod(0o640)
    with pytest.raises(LaunchError, match="not private"):
        jobspec.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hosts": 3}', "null", '{"hosts": [], "command": [], "x": 1}'])
def test_a_damaged_job_spec_is_an_error_not_a_traceback(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ticket.json"
    jobspec.write_private(path, text)
    with pytest.raises(LaunchError, match="cannot be read"):
        jobspec.load(path)
    path.unlink()
    with pytest.raises(LaunchError, match="storage that all hosts share"):
        jobspec.load(path)
    assert json.dumps(make_spec(tmp_path)._asdict())

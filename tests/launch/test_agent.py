"""The agent's own errors; tests/launch/test_supervise.py runs whole jobs with agents."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_samples import make_spec

from longctx.launch.cluster import agent, jobspec


def run(path: Path, rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    return agent.main([str(path)])


def test_a_missing_job_spec_or_another_world_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ticket.json"
    assert run(path, 0, 3, monkeypatch) == 1
    assert "is not on this host: output.folder must be on storage" in capsys.readouterr().err
    jobspec.save(make_spec(tmp_path), path)
    assert run(path, 1, 2, monkeypatch) == 1
    assert "this is rank 1 of 2, but the job has 3 ranks" in capsys.readouterr().err
    assert run(path, 1, 3, monkeypatch) == 1  # port 1: nobody listens there
    assert "the launcher at 127.0.0.1 port 1 cannot be reached from here" in capsys.readouterr().err

"""environment.json."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from longctx.train.environment import PACKAGES, environment, versions


def test_versions_of_everything_results_depend_on() -> None:
    found = versions()
    assert set(found) == {"python", *PACKAGES} and found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__


def test_the_description_is_json_without_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "canary-in-the-shell")
    found = environment({"size": 2}, "abc")
    assert found["git_commit"] == "abc" and found["world"] == {"size": 2} and found["memory_bytes"] > 2**20
    assert "canary" not in json.dumps(found)

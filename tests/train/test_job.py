"""Checks while a job is set up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from longctx.errors import ConfigError
from longctx.train import job


def test_an_automatic_group_must_be_the_same_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: Any = SimpleNamespace(group=4)
    job.agree_on_group(sizes)
    monkeypatch.setattr(job, "gather_json", lambda group: [group, 8])
    with pytest.raises(ConfigError, match=r"zero.group: auto is \[4, 8\] on the ranks"):
        job.agree_on_group(sizes)

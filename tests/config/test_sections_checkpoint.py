"""`checkpoint:` its defaults and the values that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import problems_of, text_of, variant

from longctx.config.sections.checkpoint import CheckpointSection


def test_defaults() -> None:
    """One checkpoint after the last step, the newest two kept, and a run resumes by itself."""
    assert CheckpointSection().model_dump() == {"every": 0, "keep": 2, "resume": "auto"}


@pytest.mark.parametrize(("key", "value"), [("every", -1), ("keep", 0), ("resume", "yes"), ("resume", True)])
def test_values_out_of_range_are_refused_by_key(key: str, value: Any) -> None:
    (problem,) = problems_of(text_of(variant(**{f"checkpoint__{key}": value}))).problems
    assert problem.key == f"checkpoint.{key}" and problem.code in ("out-of-range", "wrong-type")

"""`output:` its defaults and the values that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import problems_of, text_of, variant

from longctx.config.sections.output import OutputSection


def test_defaults() -> None:
    """Only the folder has to be given."""
    defaults = {"tensorboard": False, "plot": True, "sample_prompt": 64, "sample_tokens": 64}
    assert OutputSection(folder="runs/a").model_dump() == {"folder": "runs/a", **defaults}


@pytest.mark.parametrize(
    ("key", "value"), [("folder", ""), ("folder", None), ("plot", "on"), ("sample_prompt", 0), ("sample_tokens", -1)]
)
def test_values_out_of_range_are_refused_by_key(key: str, value: Any) -> None:
    (problem,) = problems_of(text_of(variant(**{f"output__{key}": value}))).problems
    assert problem.key == f"output.{key}" and problem.code in ("out-of-range", "wrong-type")

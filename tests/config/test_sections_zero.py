"""`zero:` its defaults and the values that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import problems_of, text_of, variant

from longctx.config.sections.zero import ZeroSection


def test_defaults() -> None:
    """Everything is sharded over all ranks, and nothing is offloaded."""
    zero = ZeroSection()
    assert (zero.stage, zero.group, zero.offload_optimizer, zero.offload_parameters) == (3, "none", "none", "none")
    assert zero.reduce_scatter and zero.contiguous_gradients and not zero.overlap_comm and zero.nvme_folder is None


@pytest.mark.parametrize(
    ("key", "value"), [("stage", 4), ("group", 1), ("group", "all"), ("offload_optimizer", "disk"), ("overlap_comm", 1)]
)
def test_values_out_of_range_are_refused_by_key(key: str, value: Any) -> None:
    (problem,) = problems_of(text_of(variant(**{f"zero__{key}": value}))).problems
    assert problem.key == f"zero.{key}" and problem.code in ("out-of-range", "wrong-type")

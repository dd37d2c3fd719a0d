"""The schema as one value: frozen, every key described, unknown words refused."""

from __future__ import annotations

import pytest
from config_samples import BASE, load_variant, problems_of, text_of, variant

from longctx.config.keys import sections
from longctx.config.schema import RunConfig


def test_the_json_schema_describes_every_key() -> None:
    schema = RunConfig.model_json_schema()
    assert schema["additionalProperties"] is False
    assert all(field.description for field in RunConfig.model_fields.values())
    for name, kind in sections().items():
        block = schema["$defs"][kind.__name__]
        assert block["additionalProperties"] is False
        assert set(block["properties"]) == set(kind.model_fields)
        assert all("description" in entry for entry in block["properties"].values()), name


def test_the_configuration_is_frozen() -> None:
    config = load_variant().config
    with pytest.raises(ValueError):
        config.train.steps = 5
    assert variant()["train"]["steps"] == config.train.steps == BASE["train"]["steps"]


def test_an_architecture_that_goes_around_the_hook_is_refused() -> None:
    (problem,) = problems_of(text_of(variant(model__architecture="bloom"))).problems
    assert (problem.key, problem.code) == ("model.architecture", "wrong-type") and "qwen3" in problem.message

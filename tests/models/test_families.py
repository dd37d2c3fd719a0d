"""Every family's converted classes are subclasses of its own, unique, picklable, and checked."""

from __future__ import annotations

import pickle

import pytest
from transformers import AutoConfig

from longctx.errors import ModelError
from longctx.models.hook import families
from longctx.models.hook.families import FAMILIES, family_of, mixed_classes, plain_classes, register_families


@pytest.mark.parametrize("name", FAMILIES)
def test_converted_classes_extend_their_family(name: str) -> None:
    plain, mixed = plain_classes(name), mixed_classes(name)
    assert all(issubclass(ours, theirs) for ours, theirs in zip(mixed, plain, strict=True))
    assert mixed_classes(name) == mixed and mixed[1].config_class is mixed[0]  # type: ignore[attr-defined]
    assert getattr(families, mixed[0].__name__) is mixed[0]
    config = mixed[0](attention_layers={"*": "ring"})
    assert mixed[0].__name__.encode() in pickle.dumps(config)  # which finds the class by its name
    assert family_of(config) == family_of(plain[0]()) == name
    assert FAMILIES[name].masked == (name == "bert")


def test_a_config_with_unknown_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="nonsense"):
        mixed_classes("llama")[0](attention_layers={"*": "nonsense"})


def test_auto_classes_know_the_converted_types() -> None:
    register_families()
    register_families()
    assert type(AutoConfig.for_model("longctx_llama")) is mixed_classes("llama")[0]

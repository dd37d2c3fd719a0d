"""A bounded-state module is attached to chosen layers, kept while its kind does, and removed again."""

from __future__ import annotations

import pytest
import torch
from models.mixed import mixed_model, random_tokens

from longctx.errors import ModelError
from longctx.models.convert import convert
from longctx.models.hook.bounded_layer import NOTES, bounded_child

PATH = "model.layers.{}.self_attn"


def kinds(model: torch.nn.Module) -> list[str | None]:
    found = [bounded_child(model.get_submodule(PATH.format(index))) for index in range(2)]
    return [None if child is None else child.kind.name for child in found]


def test_layers_get_the_child_of_their_kind_and_lose_it() -> None:
    model = mixed_model("llama", {"0": {"abc": {"slots": 4}}})
    child = bounded_child(model.model.layers[0].self_attn)
    assert kinds(model) == ["abc", None]
    convert(model, {"1": "cosine"})
    assert kinds(model) == ["abc", "cosine"] and bounded_child(model.model.layers[0].self_attn) is child
    convert(model, {"*": "ring"})
    assert kinds(model) == [None, None]
    assert not model.model.layers[0].self_attn._forward_hooks


def test_a_layer_that_attends_without_its_state_is_refused() -> None:
    model = mixed_model("llama", {"0": {"abc": {"slots": 4}}})
    model(input_ids=random_tokens(1, 8))
    assert not any(NOTES in vars(module) for module in model.modules())
    model.config._attn_implementation = "eager"
    with pytest.raises(ModelError, match="has a bounded state, but attended without it"):
        model(input_ids=random_tokens(1, 8))


@pytest.mark.parametrize("rows", [1, 2])
def test_options_of_a_softmax_are_refused_unless_the_layer_has_one(rows: int) -> None:
    """Seeds of dropout are a tensor with one element per row."""
    model = mixed_model("llama", {"0": {"abc": {"slots": 4}}}, attention_dropout=0.1).train()
    with pytest.raises(ModelError, match="asks for dropout_p, dropout_seed, which a layer of kind abc"):
        model(input_ids=random_tokens(rows, 8))
    convert(model, {"0": {"window": 4}})
    assert model(input_ids=random_tokens(rows, 8)).logits.isfinite().all()

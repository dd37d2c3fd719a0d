"""longctx.convert: weights and names stay, errors name what to change, folders load again, kinds mean what they say."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models.mixed import ALL, HYBRID, MIXED, SLOTS, mixed_model, random_tokens
from models.zoo import documents, eager_mask, positions_of, tiny_config, tiny_model

import longctx
from longctx.errors import ModelError
from longctx.models.convert import convert, converted
from longctx.models.hook.bounded_layer import bounded_child
from longctx.models.hook.families import FAMILIES
from longctx.models.load.pretrained import load_pretrained, read_config

from tolerances import tolerance


def logits(model: Any, tokens: torch.Tensor, **more: Any) -> torch.Tensor:
    if model.config.model_type.endswith("bert"):
        return model(tokens, **more).logits
    return model(tokens, use_cache=False, **more).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_their_names_stay(name: str) -> None:
    config = tiny_config(name)
    model = tiny_model(config, "sdpa")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert longctx.convert(model, {"0": "cosine"}) is model
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    (new,) = set(after) - set(before)
    assert new.endswith(".memory.exponent") and torch.equal(after[new], torch.full((4,), 0.5))
    assert type(model).__name__.startswith("Longctx") and isinstance(model, type(tiny_model(config, "sdpa")))
    back = convert(model, {"*": "ring"})
    assert set(back.state_dict()) == set(before)
    tokens = random_tokens(2, 12)
    model.eval()
    truth = logits(tiny_model(config, "eager").eval(), tokens)
    assert (logits(model, tokens) - truth).abs().max() <= tolerance("fp32") * truth.abs().max()


@pytest.mark.parametrize("name", [*ALL, "bert"])
def test_a_folder_loads_again(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    model = mixed_model(name, MIXED)
    tokens = random_tokens(2, 17)
    model.save_pretrained(tmp_path)
    auto: Any = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(again) is type(model) and again.config.attention_layers == model.config.attention_layers
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(loaded[key], value) for key, value in saved.items())
    for parameter in again.parameters():  # as read, they begin anywhere in memory, and MKL's last bits go by that
        parameter.data = parameter.data.clone()
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert read_config(tmp_path).model_type == f"longctx_{name}" and converted(read_config(tmp_path))


def test_a_stock_folder_is_converted_while_it_is_read(tmp_path: Path) -> None:
    stock = tiny_model(tiny_config("llama"), "sdpa")
    stock.save_pretrained(tmp_path)
    config = convert(read_config(tmp_path), MIXED)
    model = load_pretrained(tmp_path, config=config)
    same = model.state_dict()
    assert all(torch.equal(same[key], value) for key, value in stock.state_dict().items())
    assert float(same["model.layers.0.self_attn.memory.key_control"].std()) > 0.05, "new weights are drawn"
    assert torch.equal(same["model.layers.1.self_attn.memory.exponent"], torch.full((4,), 0.5))
    built = longctx.build(tmp_path, longctx.Mesh(world_size=1), layers=MIXED)
    assert built.config.attention_layers == config.attention_layers


def test_copies_keep_their_memories() -> None:
    model, tokens = mixed_model("llama", HYBRID, 4), random_tokens(1, 9)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(logits(twin, tokens), logits(model, tokens))
        assert bounded_child(twin.model.layers[0].self_attn) is not bounded_child(model.model.layers[0].self_attn)


@pytest.mark.parametrize("kind", ["whole", "packed", "left"])
def test_window_layers_equal_a_model_with_windows(kind: str) -> None:
    """A Llama converted to windows is a Mistral with the same weights."""
    config = tiny_config("mistral")
    ids = documents(kind, 2, 40)
    tokens, positions, valid = random_tokens(2, 40), positions_of(ids), ids >= 0
    eager = tiny_model(config, "eager").double()
    mask = eager_mask(config, ids, torch.float64)
    truth = eager(tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
    llama = tiny_model(tiny_config("llama"), "longctx").double()
    llama.load_state_dict(eager.state_dict())
    convert(llama, {"*": {"window": config.sliding_window}})
    out = llama(tokens, position_ids=positions, document_ids=ids, use_cache=False).logits
    assert (out - truth)[valid].abs().max() <= tolerance("model") * truth[valid].abs().max()


def test_packed_documents_equal_documents_alone() -> None:
    model = mixed_model("llama", HYBRID, 4)
    tokens = random_tokens(1, 30)
    starts = [0, 7, 18, 30]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(starts, starts[1:], strict=False)])[None]
    together = logits(model, tokens, position_ids=positions)
    alone = [logits(model, tokens[:, a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    assert (together - torch.cat(alone, 1)).abs().max() <= tolerance("model")


def test_padding_changes_nothing() -> None:
    model = mixed_model("llama", HYBRID, 4)
    tokens = random_tokens(1, 20)
    truth = logits(model, tokens)
    for left, right in ((3, 0), (0, 4), (2, 5)):
        padded = torch.nn.functional.pad(tokens, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (left, right))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = logits(model, padded, attention_mask=mask, position_ids=positions)[:, left : left + 20]
        assert (out - truth).abs().max() <= tolerance("model")


def test_gradients_reach_every_weight() -> None:
    model = mixed_model("qwen3", {"0": {"abc": {**SLOTS, "tied": False, "control_input": "kv"}}, "1": "cosine"}).train()
    logits(model, random_tokens(2, 16)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0), name


def test_checkpointing_gives_the_same_gradients() -> None:
    tokens, gradients = random_tokens(2, 16), []
    for reentrant in (None, False, True):
        model = mixed_model("llama", HYBRID, 4).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        logits(model, tokens).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in gradients[0].items())


@pytest.mark.parametrize(
    "layers, says",
    [
        ({"0-5": "abc"}, "has 2 layers, 0 to 1"),
        ({"1-0": "abc"}, "write '0-1'"),
        ({"first": "abc"}, "'first'"),
        ({"0": "abd"}, "did you mean 'abc'"),
        ({"0": {"abc": {"slot": 4}}}, "did you mean 'slots'"),
        ({"0": {"abc": {"slots": 0}}}, "slots is 0"),
        ({"0": {"abc": {"control": "lineformer"}}}, "did you mean 'linformer'"),
        ({"0": {"window": True}}, "a block of keys"),
        ({"0": ["abc"]}, "name one kind"),
        ({}, "write a block"),
    ],
)
def test_errors_name_what_to_change(layers: dict[str, Any], says: str) -> None:
    model = tiny_model(tiny_config("llama"), "sdpa")
    with pytest.raises(ModelError) as error:
        convert(model, layers)
    assert says in str(error.value)
    assert type(model).__name__ == "LlamaForCausalLM", "nothing is half converted"


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ModelError, match="nearest is qwen3"):
        convert(tiny_config("qwen3_moe"), MIXED)
    with pytest.raises(ModelError, match="converts LlamaForCausalLM"):
        convert(tiny_model(tiny_config("llama"), "sdpa").model, MIXED)
    with pytest.raises(ModelError, match="neither a transformers model nor"):
        convert(torch.nn.Linear(2, 2), MIXED)


def test_another_attention_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = mixed_model("llama", MIXED)
    with pytest.raises(ModelError, match="leave attn_implementation out"):
        model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="leave attn_implementation out"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    model.config._attn_implementation = "sdpa"  # around the model's back
    with pytest.raises(ModelError, match="attended without it"):
        logits(model, random_tokens(1, 4))


def test_dropout_of_probabilities_is_refused_in_training() -> None:
    model = mixed_model("llama", MIXED, attention_dropout=0.1)
    logits(model, random_tokens(1, 4))
    with pytest.raises(ModelError, match="to 0"):
        logits(model.train(), random_tokens(1, 4))


def test_converting_again_changes_what_is_named() -> None:
    model = mixed_model("llama", HYBRID, 4)
    kept = bounded_child(model.model.layers[0].self_attn)
    convert(model, {"3": {"abc": {"slots": 3}}, "2": "ring"})
    kinds = [bounded_child(layer.self_attn) for layer in model.model.layers]
    assert kinds[0] is kept and kinds[1] is None and kinds[2] is None and kinds[3].kind.slots == 3
    assert logits(model, random_tokens(1, 5)).isfinite().all()

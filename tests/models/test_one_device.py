"""register() alone, on one device: five kinds of batch, caches and generation equal eager transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.zoo import CAUSAL, eager_mask, tiny_config, tiny_model

from longctx.errors import ModelError
from longctx.models.hook.masks import documents_from_positions

from tolerances import tolerance

LENGTH = 40


def pair(name: str) -> tuple[Any, Any]:
    config = tiny_config(name)
    return tiny_model(config, "eager").eval(), tiny_model(config, "longctx").eval()


def batches() -> dict[str, tuple[dict[str, Any], dict[str, Any], torch.Tensor]]:
    """name -> (what our model gets, what eager gets, the valid tokens)."""
    tokens = torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(2, LENGTH, dtype=torch.int64)
    left, right = ones.clone(), ones.clone()
    left[0, :7], right[1, -5:] = 0, 0
    hole = ones.clone()
    hole[0, 9:14], hole[1, 20], hole[1, :2] = 0, 0, 0
    skipping = {"attention_mask": hole, "position_ids": (hole.cumsum(-1) - 1).masked_fill(hole == 0, 1)}
    packed = torch.cat([torch.arange(17), torch.arange(LENGTH - 17)])[None].expand(2, -1)
    shifted = {"attention_mask": left, "position_ids": (left.cumsum(-1) - 1).clamp(min=0)}
    isolated = {"position_ids": packed, "use_cache": False}  # the only way in which eager isolates documents
    table: dict[str, tuple[dict[str, Any], dict[str, Any] | None, torch.Tensor]] = {
        "plain": ({}, None, ones),
        "left-padded": ({"attention_mask": left}, None, left),
        "left-padded with positions": (shifted, None, left),
        "hole": ({"attention_mask": hole}, None, hole),
        "hole that positions skip": (skipping, None, hole),
        "right-padded": ({"attention_mask": right}, None, right),
        "packed": ({"position_ids": packed}, isolated, ones),
        "packed + all-ones mask": ({"position_ids": packed, "attention_mask": ones}, isolated, ones),
    }
    return {
        name: (
            {"input_ids": tokens, **ours},
            {"input_ids": tokens, **(ours if theirs is None else theirs)},
            valid.bool(),
        )
        for name, (ours, theirs, valid) in table.items()
    }


@pytest.mark.parametrize("name", list(CAUSAL))
def test_logits_equal_eager(name: str) -> None:
    eager, model = pair(name)
    for batch, (ours, theirs, valid) in batches().items():
        if name == "gpt-oss" and "packed" in batch:  # it does not tell its mask of positions, so eager needs a mask
            packed = documents_from_positions(theirs["position_ids"])
            theirs = {**theirs, "attention_mask": eager_mask(eager.config, packed, torch.float32)}
        for use_cache in (False, True):
            with torch.no_grad():
                truth = eager(**{"use_cache": use_cache, **theirs}).logits
                logits = model(use_cache=use_cache, **ours).logits
            error = float((logits - truth)[valid].abs().max())
            assert error <= tolerance("model"), f"{name}, {batch}, use_cache={use_cache}: {error:.1e}"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt-oss"])
def test_generation_with_a_cache_equals_eager(name: str) -> None:
    """Longer than the window, so that a sliding cache has dropped keys; one row is left-padded."""
    eager, model = pair(name)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    settings = dict(attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(tokens, **settings), eager.generate(tokens, **settings))


def test_a_long_prompt_in_chunks() -> None:
    """Several queries against a longer cache are aligned at the end, not at the start."""
    from transformers import DynamicCache

    eager, model = pair("llama")
    tokens = torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in ((0, 13), (13, 14), (14, LENGTH))]
        truth = eager(tokens).logits
    assert float((torch.cat(parts, 1) - truth).abs().max()) <= tolerance("model")


def test_bert_equals_eager_with_padding_and_isolates_given_documents() -> None:
    config = tiny_config("bert")
    eager, model = tiny_model(config, "eager").eval(), tiny_model(config, "longctx").eval()
    for _, (ours, theirs, valid) in batches().items():
        if "position_ids" not in ours:
            with torch.no_grad():
                assert float((model(**ours).logits - eager(**theirs).logits)[valid].abs().max()) <= tolerance("model")
    tokens = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0] * 8 + [1] * 12])
    with torch.no_grad():
        both = model(tokens, document_ids=ids).logits[:, :8]
        alone = eager(tokens[:, :8]).logits
    assert float((both - alone).abs().max()) <= tolerance("model")


def test_an_id_that_comes_back_is_another_document() -> None:
    _, model = pair("llama")
    tokens = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(8), torch.arange(6), torch.arange(6)])[None]
    with torch.no_grad():
        again, other = (
            model(tokens, position_ids=positions, document_ids=torch.tensor([[4] * 8 + [1] * 6 + [last] * 6])).logits
            for last in (4, 7)
        )
    assert torch.equal(again, other)


def test_document_ids_win_over_positions() -> None:
    _, model = pair("llama")
    tokens = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(20)[None]
    with torch.no_grad():
        whole = model(tokens, position_ids=positions).logits
        packed = model(tokens, position_ids=positions, document_ids=torch.tensor([[0] * 8 + [1] * 12])).logits
    assert float((whole - packed)[:, :8].abs().max()) <= tolerance("model")
    assert float((whole - packed)[:, 8:].abs().max()) > 1e-3


@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_save_and_load_is_bitwise(name: str, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    config = tiny_config(name)
    model = tiny_model(config, "longctx").eval()
    model.save_pretrained(tmp_path)
    assert "longctx" not in (tmp_path / "config.json").read_text(), "the folder must load without longctx"
    family = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    again = family.from_pretrained(tmp_path, attn_implementation="longctx").eval()
    assert again.config._attn_implementation == "longctx"
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_what_one_device_refuses_by_name() -> None:
    _, model = pair("llama")
    tokens = torch.arange(12)[None]
    with pytest.raises(ModelError, match="no T x T mask"):
        model(tokens, attention_mask=torch.zeros(1, 1, 12, 12))
    with pytest.raises(ModelError, match="StaticCache"):
        model.generate(tokens, max_new_tokens=2, do_sample=False, cache_implementation="static")
    with pytest.raises(ModelError, match=r"document_ids has shape \(1, 5\)"):
        model(tokens, document_ids=torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ModelError, match="cu_seq_lens_q"):
        model(tokens, cu_seq_lens_q=torch.tensor([0, 5, 12]))
    with pytest.raises(ModelError, match="packed prompt or a prefix"):
        cache = model(tokens, position_ids=torch.tensor([[*range(7), *range(5)]]), use_cache=True).past_key_values
        model(tokens[:, :1], past_key_values=cache, position_ids=torch.tensor([[5]]))


def test_a_layer_that_disagrees_with_its_models_mask_is_refused() -> None:
    tokens = torch.arange(12)[None]
    for attribute, value in (("sliding_window", 5), ("sliding_window", None), ("is_causal", False)):
        _, model = pair("gemma3")
        setattr(model.model.layers[0].self_attn, attribute, value)
        with pytest.raises(ModelError, match="Gemma3Attention asks for.*but its model builds a mask"):
            model(tokens)


def test_a_decoder_used_as_an_encoder() -> None:
    config = tiny_config("llama")
    config.is_causal = False
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = tiny_model(config, "eager").eval()(tokens, use_cache=False).logits
        logits = tiny_model(config, "longctx").eval()(tokens, use_cache=False).logits
    assert float((logits - truth).abs().max()) <= tolerance("model")

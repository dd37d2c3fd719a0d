"""attach_attention: where mesh and layout go, what is set, and what survives copies, casts and a second call."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models.zoo import tiny_config, tiny_model

import longctx
from longctx.models.attach import attach_attention
from longctx.models.hook.binding import binding_of


def one() -> longctx.Mesh:
    return longctx.Mesh(ring=1, data=1, world_size=1)


def test_every_module_knows_its_mesh_and_the_config_is_set() -> None:
    mesh = one()
    model = tiny_model(tiny_config("gemma3"), "eager")
    attach_attention(model, mesh, "striped")
    assert model.config._attn_implementation == "longctx" and model.config.use_cache is True
    bindings = {id(binding_of(module)) for module in model.modules()}
    assert len(bindings) == 1
    binding = binding_of(model)
    assert binding is not None and binding.mesh is mesh and binding.layout == "striped"


def test_two_models_of_one_process_keep_their_own_mesh() -> None:
    first, second = (tiny_model(tiny_config("llama"), "longctx") for _ in range(2))
    attach_attention(first, one(), "zigzag")
    attach_attention(second, one(), "contiguous")
    assert [binding_of(m).layout for m in (first, second)] == ["zigzag", "contiguous"]  # type: ignore[union-attr]
    assert binding_of(copy.deepcopy(first)) is binding_of(first)


def test_attaching_again_replaces_the_hooks() -> None:
    model = tiny_model(tiny_config("llama"), "longctx")
    for _ in range(3):
        attach_attention(model, one())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert hooks == 6  # two on the model, two on its rotary module, two that keep no cache
    model(torch.arange(8)[None])
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 6


def test_nested_text_configs_are_set() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = tiny_config("gemma3").to_dict()
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    vision["patch_size"] = 14
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=5)
    model = Gemma3ForConditionalGeneration(config)
    attach_attention(model, one())
    assert model.config.text_config._attn_implementation == "longctx"
    assert model.config.text_config.use_cache is True


def test_no_forward_keeps_a_cache_and_no_export_is_without_one(tmp_path: Path) -> None:
    """Training needs no cache; generate() of the saved model does."""
    from transformers import AutoModelForCausalLM

    for name in ("llama", "gpt2"):
        model = tiny_model(tiny_config(name), "longctx").eval()
        attach_attention(model, one())
        assert model(torch.arange(8)[None]).past_key_values is None
        assert model(torch.arange(8)[None], use_cache=None).past_key_values is None
        assert model(torch.arange(8)[None], use_cache=True).past_key_values is not None
        model.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert again.config.use_cache is True and again.generation_config.use_cache is not False


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cast_to_bf16_leaves_rotary_frequencies_in_fp32(name: str) -> None:
    model = tiny_model(tiny_config(name), "longctx")
    rotary = model.model.rotary_emb
    names = [n for n, _ in rotary.named_buffers() if n.endswith("inv_freq")]
    before = {n: getattr(rotary, n).clone() for n in names}
    attach_attention(model, one())
    model.bfloat16()
    assert any(not torch.equal(before[n], getattr(rotary, n).float()) for n in names), "the cast must round something"
    model(torch.arange(8)[None])
    for n in names:
        assert getattr(rotary, n).dtype == torch.float32 and torch.equal(before[n], getattr(rotary, n))


def test_a_failed_forward_leaves_the_model_usable() -> None:
    config = tiny_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    model = tiny_model(config, "longctx")
    attach_attention(model, one())
    with pytest.raises(longctx.LongctxError):
        model(torch.arange(8)[None], document_ids=torch.zeros(1, 3, dtype=torch.int64))
    assert model.model.rotary_emb.rope_type == "dynamic"
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()

"""Our sizes become the model that transformers builds, for every architecture."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from config_samples import load_variant

from longctx.config.architecture import parameter_count, transformers_keywords
from longctx.config.sections.model import Architecture


@pytest.mark.parametrize("name", get_args(Architecture))
def test_every_architecture_is_built_with_the_sizes_asked_for(name: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kv_heads = {"gpt2": ...}.get(name, 2)
    config = load_variant(model__architecture=name, model__kv_heads=kv_heads).config
    built = AutoConfig.for_model(name, **transformers_keywords(config, 1000, end_of_document=3, beginning=2))
    assert (built.hidden_size, built.num_hidden_layers, built.num_attention_heads) == (64, 2, 4)
    assert built.vocab_size == 1000 and built.max_position_embeddings == 4096
    assert built.eos_token_id == 3 and built.pad_token_id is None and built.use_cache is True
    assert getattr(built, "attention_dropout", getattr(built, "attn_pdrop", None)) == 0.0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built)
    # norms, biases and learned positions are left out of the estimate; of a small model they are a few percent
    positions = sum(p.numel() for n, p in model.named_parameters() if n.endswith("wpe.weight"))
    real = sum(parameter.numel() for parameter in model.parameters()) - positions
    estimated = parameter_count(
        load_variant(
            model__architecture=name,
            model__kv_heads=kv_heads,
            model__vocab_size=1024,
            model__tie_embeddings=built.tie_word_embeddings,
        ).config
    )
    assert estimated is not None and abs(real - estimated) / real < 0.05
    attention = next(m for n, m in model.named_modules() if n.endswith(("self_attn", "attn")))
    assert getattr(attention, "head_dim", 16) == 16


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_windows_reach_the_layers(name: str):
    from transformers import AutoConfig

    config = load_variant(model__architecture=name, attention__window=128).config
    built: Any = AutoConfig.for_model(name, **transformers_keywords(config, 1000))
    assert built.sliding_window == 128
    assert "sliding_attention" in (getattr(built, "layer_types", None) or ["sliding_attention"])


def test_extra_keywords_are_passed_on():
    config = load_variant(
        model__extra={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-5}
    ).config
    keywords = transformers_keywords(config, 1000)
    assert keywords["rope_parameters"]["rope_theta"] == 5e5 and keywords["rms_norm_eps"] == 1e-5
    assert keywords["num_key_value_heads"] == 2 and keywords["vocab_size"] == 1000

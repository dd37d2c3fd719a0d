"""Parameters of published and of small models, dense and sparse: the planner's count is transformers' count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_samples import BASE, load_variant
from pretrained_folders import llama_weights, pretrained_folder
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longctx.errors import ConfigError
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape, shape_of, shape_of_settings
from longctx.plan.work import flops_of
from longctx.train.report.flops import FlopsModel

MIXTRAL_8X7B = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 32000, "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "use_sliding_window": False,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 129280, "tie_word_embeddings": False, "num_nextn_predict_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "total", "active"),
    [(MIXTRAL_8X7B, 46.70e9, 12.9e9), (QWEN3_30B_A3B, 30.53e9, 3.3e9), (DEEPSEEK_V3, 671.03e9, 37.5e9)],
)
def test_published_models_have_their_published_size(settings: dict[str, Any], total: float, active: float) -> None:
    shape = shape_of_settings(settings)
    assert shape.parameters == pytest.approx(total, rel=1e-4)
    assert shape.matrix_weights + shape.embedding == pytest.approx(active, rel=0.03)


SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False,
    "num_experts_per_tok": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6},
    "qwen3_moe": {"num_experts": 6, "head_dim": 24, "mlp_only_layers": [1]},
    "qwen2_moe": {"num_experts": 6, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2},
    "olmoe": {"num_experts": 6},
    "deepseek_v3": LATENT,
    "deepseek_v2": {**LATENT, "q_lora_rank": None},
    "glm4_moe": {"n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 2, "n_group": 1,
                 "head_dim": 16},
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 24}, "mistral": {}, "olmo2": {},
}  # fmt: skip


def small(kind: str) -> tuple[Any, ModelShape, int]:
    """Return a small model's configuration, its shape and its parameters as transformers builds it."""
    own = {key: value for key, value in SIZES.items() if kind not in ("mixtral", "olmoe") or "moe_" not in key}
    config = AutoConfig.for_model(kind, **{**own, **SMALL[kind]})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config, shape_of_settings(json.loads(config.to_json_string())), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", SMALL)
def test_small_models_are_counted_as_transformers_builds_them(kind: str) -> None:
    config, shape, real = small(kind)
    assert abs(shape.parameters - real) <= (0 if kind != "glm4_moe" else 0.01 * real)
    # what training counts as useful: the same weights, norms and biases besides
    counted = FlopsModel(config, real)
    others = shape.layers * (2 * shape.hidden + shape.small) + shape.hidden
    assert counted.matrix_weights == pytest.approx(shape.matrix_weights + others, rel=0.01)


def test_a_token_pays_for_its_own_experts_only() -> None:
    one, two = (shape_of_settings(MIXTRAL_8X7B | {"num_experts_per_tok": number}) for number in (1, 2))
    assert one.parameters == two.parameters and two.mlp_products == pytest.approx(2 * one.mlp_products, rel=1e-3)
    assert flops_of(one, Setup(4096)).products < flops_of(two, Setup(4096)).products < 6 * two.parameters * 4096


def test_a_folder_whose_layers_are_unlike_the_formulas_is_refused(tmp_path: Path) -> None:
    more = {f"model.layers.{layer}.mamba.in_proj.weight": np.zeros((256, 64), np.float32) for layer in (0, 1)}
    folder = pretrained_folder(tmp_path / "model", weights={**llama_weights(), **more})
    with pytest.raises(ConfigError, match="does not know this kind of model"):
        shape_of(load_variant(**from_folder(folder)).config)


def test_layers_that_guess_further_tokens_are_not_counted(tmp_path: Path) -> None:
    further = {"model.layers.2.eh_proj.weight": np.zeros((32, 64), np.float32)}
    folder = pretrained_folder(tmp_path / "model", weights={**llama_weights(), **further}, num_nextn_predict_layers=1)
    shape = shape_of(load_variant(**from_folder(folder)).config)
    assert shape.parameters == sum(weight.size for weight in llama_weights().values())


def from_folder(folder: Path) -> dict[str, Any]:
    changes: dict[str, Any] = {f"model__{key}": ... for key in BASE["model"] if key != "dtype"}
    return changes | {"data__tokenizer": ..., "data__vocab_size": ..., "model__pretrained": str(folder)}


def test_a_folder_is_counted_by_its_weights(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model")
    shape = shape_of(load_variant(**from_folder(folder)).config)
    assert shape.parameters == sum(weight.size for weight in llama_weights().values())
    assert shape.parameters == shape_of_settings(json.loads((folder / "config.json").read_text())).parameters


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    shape = shape_of_settings(config.to_dict(), 4)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    llama_8b = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)
    assert llama_8b.parameters == 8_030_261_248  # Llama 3.1 8B


def test_a_yaml_has_the_shape_of_its_model() -> None:
    shape = shape_of(load_variant(model__kv_heads=2, model__dtype="bf16").config)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.inner, shape.itemsize) == (4, 2, 16, 192, 2)
    layers: dict[str, Any] = {"0": {"window": 64}, "1": {"abc": {"slots": 32}}}
    mixed = shape_of(load_variant(attention__layers=layers).config)
    assert (mixed.full_layers, mixed.window_layers, mixed.window, mixed.bounded_layers, mixed.slots) == (
        0,
        1,
        64,
        1,
        32,
    )
    with pytest.raises(ConfigError, match="no num_attention_heads"):
        shape_of_settings({"hidden_size": 64})

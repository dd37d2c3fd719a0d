"""Every causal and masked language model class of the installed transformers, built small from its config class."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

VOCABULARY = 64
_LAYERS = 2
_LARGEST = 8_000_000  # parameters

# Sizes by the names that transformers' configs give them; a config takes those that it declares.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "embed_dim"), 32),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers num_decoder_layers decoder_layers encoder_layers "
        "num_encoder_layers".split(), _LAYERS
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads".split(), 4
    ),
    **dict.fromkeys("num_key_value_heads num_kv_heads num_key_value_groups".split(), 2),
    **dict.fromkeys("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff hidden_dim d_inner".split(), 64),
    **dict.fromkeys("max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length".split(), 128),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k top_k num_experts_per_token moe_top_k".split(), 2),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size moe_ffn_hidden_size".split(), 16),
    **dict.fromkeys("qk_nope_head_dim qk_rope_head_dim v_head_dim head_dim d_kv rotary_dim".split(), 8),
    **dict.fromkeys("q_lora_rank kv_lora_rank o_lora_rank index_head_dim".split(), 16),
    **dict.fromkeys("n_group topk_group num_expert_group moe_group_size index_n_heads".split(), 1),
    **dict.fromkeys("first_k_dense_replace moe_layer_start_index".split(), 1),
    "vocab_size": VOCABULARY, "n_shared_experts": 1, "type_vocab_size": 2, "sliding_window": 10,
    "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "state_size": 8,
}  # fmt: skip
_TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def class_names() -> list[str]:
    """Return the names of the classes that transformers calls language models, causal or masked, sorted."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    endings = ("ForCausalLM", "ForMaskedLM", "LMHeadModel")
    found = {name for name in dir(transformers) if name.endswith(endings) and not name.startswith("AutoModel")}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES):
        for value in mapping.values():
            found.update([value] if isinstance(value, str) else value)
    return sorted(found)


def small_config(name: str) -> Any:
    """Return a small config of the class called ``name``."""
    import transformers

    kind = getattr(transformers, name).config_class
    known = {field.name for field in dataclasses.fields(kind)}
    decoder = {"is_decoder": True} if "is_decoder" in known and not name.endswith("ForMaskedLM") else {}
    return _shrunk(kind, {**decoder, **_MORE.get(name, {})})


def _shrunk(kind: Any, more: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)} | set(getattr(kind, "attribute_map", {}))
    arguments = {key: value for key, value in _SMALL.items() if key in known}
    arguments |= {key: value for key, value in _TOKENS.items() if key in known}
    arguments |= {key: 0.0 for key in known if ("drop" in key or "layerdrop" in key) and _is_float(kind, key)}
    if "kv_lora_rank" in known:  # latent attention has no groups
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    mapped = getattr(kind, "attribute_map", {})
    for key in list(arguments):  # a name and the one that it stands for
        if key in mapped and mapped[key] in arguments:
            del arguments[key]
    for key, nested in getattr(kind, "sub_configs", {}).items():
        if key not in more and dataclasses.is_dataclass(nested) and nested.__name__ != "AutoConfig":
            arguments[key] = _shrunk(nested, {})
    return kind(**{**arguments, **more})


def _is_float(kind: Any, key: str) -> bool:
    return isinstance(getattr(kind, key, None), float)


_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_NARROW = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16}
_BAGS = {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16), "attention_head_size": 8}
_SPOKEN = {"pronunciation_vocab_size": 64, "shape_vocab_size": 64, "pronunciation_embed_dim": 16, "shape_embed_dim": 16}
# What else a class needs to be built small.
_MORE: dict[str, dict[str, Any]] = {
    "CohereCompassForCausalLM": {
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        },
    },
    "DeepseekV4ForCausalLM": {
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "Dots3NoteForCausalLM": {"num_key_value_heads": 4},
    "EsmcForMaskedLM": {"num_key_value_heads": 4},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 10},
    "Gemma3nForCausalLM": {
        **_SLIDING, **_NARROW, "num_kv_shared_layers": 0, "altup_num_inputs": 2, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "Gemma4ForCausalLM": {**_SLIDING, **_NARROW},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["attention", "attention"]},
    "KimiLinearForCausalLM": {
        "linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"]
    },
    "LukeForMaskedLM": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "Lfm2MoeForCausalLM": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "NeoMMEForMaskedLM": {"head_dim": 16},
    "RoCBertForCausalLM": _SPOKEN,
    "RoCBertForMaskedLM": _SPOKEN,
    "ReformerForMaskedLM": {**_BAGS, "is_decoder": False, "attn_layers": ["local", "lsh"]},
    "ReformerModelWithLMHead": {**_BAGS, "is_decoder": True, "attn_layers": ["local", "lsh"]},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "XmodForMaskedLM": {"default_language": "en_XX"},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"], "mamba_ngroups": 1, "n_mamba_heads": 4},
}  # fmt: skip


def small_model(name: str, seed: int = 0, config: Any = None) -> Any:
    """Return a small eager model of the class called ``name``, in fp64, with the same weights every time."""
    import transformers

    config = small_config(name) if config is None else config
    kind = getattr(transformers, name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    if size > _LARGEST:
        raise ValueError(f"{name} has {size} parameters, too many to be built here")
    torch.manual_seed(seed)
    model = kind._from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model.double()

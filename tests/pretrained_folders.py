"""Small pretrained folders written without torch: Llama- and GPT-2-like, with a byte tokenizer by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from longctx.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 300,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 2, "n_head": 4,
    "vocab_size": 300, "n_positions": 8192,
}  # fmt: skip


def llama_weights(hidden: int = 32, keys: int = 16, inner: int = 64, vocabulary: int = 300) -> dict[str, Any]:
    """Return the weights of a model that LLAMA describes."""
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    for layer in ("model.layers.0.", "model.layers.1."):
        for name, shape in {
            "q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, hidden)
        }.items():  # fmt: skip
            shapes[f"{layer}self_attn.{name}"] = shape
        for name, shape in {
            "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)
        }.items():  # fmt: skip
            shapes[f"{layer}mlp.{name}"] = shape
        shapes[f"{layer}input_layernorm"] = shapes[f"{layer}post_attention_layernorm"] = (hidden,)
    return {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}


def gpt2_weights(positions: int = 8192) -> dict[str, Any]:
    """Return the weights of a model that GPT2 describes."""
    shapes: dict[str, tuple[int, ...]] = {"wte": (300, 32), "wpe": (positions, 32)}
    for layer in ("h.0.", "h.1."):
        shapes |= {f"{layer}attn.c_attn": (32, 96), f"{layer}attn.c_proj": (32, 32)}
        shapes |= {f"{layer}mlp.c_fc": (32, 128), f"{layer}mlp.c_proj": (128, 32)}
    return {f"transformer.{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}


def pretrained_folder(
    folder: Path,
    settings: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    **changes: Any,
) -> Path:
    """Write a folder.

    Args:
        settings: config.json; LLAMA by default, with ``changes``.
        weights: those of LLAMA by default.
        tokenizer: bytes by default.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**(settings or LLAMA), **changes}))
    save_file(llama_weights() if weights is None else weights, folder / "model.safetensors", {"format": "pt"})
    (tokenizer or ByteTokenizer()).save(folder)
    return folder

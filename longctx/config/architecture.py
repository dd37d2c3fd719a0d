"""Map our model keys to transformers' configuration, per architecture. Plain dictionaries; it is not imported."""

from __future__ import annotations

from typing import Any

from longctx.config.rope import resolve
from longctx.config.schema import RunConfig
from longctx.config.sections.model import ModelSection
from longctx.errors import ModelError
from longctx.models.load.expected import count_parameters
from longctx.models.load.headers import read_weights
from longctx.models.load.rope import rope_changes
from longctx.models.load.settings import read_settings

WINDOWED = frozenset({"mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"})
"""architectures whose attention can have a sliding window"""
FREE_HEAD_DIM = frozenset({"llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text"})
"""architectures in which heads x head_dim need not be hidden_size"""
GROUPED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "olmo", "olmo2"})
"""architectures with fewer key/value heads than query heads"""
ROTARY = GROUPED
CONVERTIBLE = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt2"})
"""architectures whose attention layers can be replaced (attention.layers)"""
UNGATED = frozenset(
    "gpt2 phi apertus arcee bert bert-generation big_bird biogpt bloom camembert codegen data2vec-text electra ernie "
    "falcon gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj jais2 megatron-bert mpt nanochat nemotron opt "
    "persimmon rembert roberta roberta-prelayernorm roc_bert roformer starcoder2 xglm xlm-roberta xlm-roberta-xl "
    "xmod".split()
)
"""architectures whose MLP has two matrices, not three"""
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}

OWNED_KEYWORDS = {
    **dict.fromkeys(("hidden_size", "n_embd"), "model.hidden_size"),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), "model.layers"),
    **dict.fromkeys(("num_attention_heads", "n_head"), "model.heads"),
    "num_key_value_heads": "model.kv_heads",
    "head_dim": "model.head_dim",
    **dict.fromkeys(("intermediate_size", "n_inner"), "model.intermediate_size"),
    "vocab_size": "model.vocab_size",
    **dict.fromkeys(("max_position_embeddings", "n_positions"), "model.max_positions"),
    "tie_word_embeddings": "model.tie_embeddings",
    **dict.fromkeys(("dtype", "torch_dtype"), "model.dtype"),
    **dict.fromkeys(("model_type", "architectures"), "model.architecture"),
    **dict.fromkeys(("sliding_window", "use_sliding_window", "max_window_layers"), "attention.window"),
}
"""transformers keyword -> the key of ours that owns it"""
REFUSED_KEYWORDS = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "attn_implementation",
        "experts_implementation",
        "use_cache",
        "quantization_config",
    }
    | {"is_encoder_decoder", "add_cross_attention"}
)
"""transformers keywords that would run third-party code or replace our attention"""


def head_dim(model: ModelSection) -> int | None:
    """Return the size of one head; None if sizes are missing."""
    if model.head_dim is not None:
        return model.head_dim
    return model.hidden_size // model.heads if model.hidden_size and model.heads else None


def intermediate_size(model: ModelSection) -> int | None:
    """Return the width of the MLP; None if sizes are missing."""
    if model.intermediate_size is not None or model.hidden_size is None:
        return model.intermediate_size
    if model.architecture in UNGATED:
        return 4 * model.hidden_size
    return -(-8 * model.hidden_size // 3 // 64) * 64


def transformers_keywords(
    config: RunConfig, vocabulary_size: int, end_of_document: int | None = None, beginning: int | None = None
) -> dict[str, Any]:
    """Return the keywords of ``AutoConfig.for_model(config.model.architecture, **keywords)``.

    Args:
        config: with ``model.architecture`` given.
        vocabulary_size: the tokenizer's; ``model.vocab_size`` takes precedence.
        end_of_document: the tokenizer's id for it, or None.
        beginning: the tokenizer's ``bos_token_id``, or None.
    """
    model, window = config.model, config.attention.window
    keywords: dict[str, Any] = {
        "vocab_size": model.vocab_size or vocabulary_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": intermediate_size(model),
        "max_position_embeddings": model.max_positions or config.data.sequence_length,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": beginning,
        "eos_token_id": end_of_document,
        "pad_token_id": None,  # a padding id would freeze that row of the embedding
    }
    if model.architecture in GROUPED:
        keywords["num_key_value_heads"] = model.kv_heads or model.heads
    if model.architecture in FREE_HEAD_DIM:
        keywords["head_dim"] = head_dim(model)
    if model.architecture in ("gemma2", "gemma3_text"):
        keywords["query_pre_attn_scalar"] = head_dim(model)
    if model.architecture == "gpt2":
        keywords |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        keywords = {_GPT2_NAMES.get(name, name): value for name, value in keywords.items()}
    if window is not None:
        keywords["sliding_window"] = window
        if model.architecture in ("qwen2", "qwen3"):
            keywords |= {"use_sliding_window": True, "max_window_layers": 0}
    rope = resolve(config)
    if rope is not None:
        keywords |= rope_changes({"model_type": model.architecture}, rope.parameters)
        keywords["max_position_embeddings"] = rope.positions
    return keywords | model.extra


def pretrained_changes(config: RunConfig) -> dict[str, Any]:
    """Return the keys of a pretrained folder's config.json that the run gives other values, by transformers' names.

    Raises:
        ModelError: `model.rope` is given and the folder's config.json cannot be read.
    """
    model = config.model
    changes: dict[str, Any] = dict(model.extra)
    if model.max_positions is not None:
        changes["max_position_embeddings"] = model.max_positions
    if model.pretrained is not None and model.rope is not None:
        settings = read_settings(model.pretrained)
        rope = resolve(config, settings)
        assert rope is not None
        changes |= {"max_position_embeddings": rope.positions, **rope_changes(settings, rope.parameters)}
    return changes


def parameter_count(config: RunConfig) -> int | None:
    """Return the model's parameter count: exact for a pretrained folder, approximate from scratch (without norms and
    biases); None if unknown."""
    model = config.model
    if model.pretrained is not None:
        try:
            return count_parameters(read_settings(model.pretrained), read_weights(model.pretrained))
        except ModelError:
            return None  # `machine.inspect` reports what is wrong with the folder
    vocabulary = model.vocab_size or vocabulary_size(config)
    inner, size = intermediate_size(model), head_dim(model)
    if not (model.hidden_size and model.layers and model.heads and inner and size and vocabulary):
        return None
    hidden = model.hidden_size
    attention = 2 * hidden * size * (model.heads + (model.kv_heads or model.heads))
    mlp = (2 if model.architecture in UNGATED else 3) * hidden * inner
    embeddings = vocabulary * hidden * (1 if model.tie_embeddings else 2)
    return embeddings + model.layers * (attention + mlp)


def vocabulary_size(config: RunConfig) -> int | None:
    """Return the tokenizer's size if the configuration sets it (a trained BPE may be smaller)."""
    return {"bpe": config.data.vocab_size, "bytes": 257}.get(config.data.tokenizer)

"""Build a transformers config from an architecture's name and sizes, with the same size names for all architectures."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from longctx.errors import ModelError

REFUSALS = (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError)  # what config classes raise

# longctx's size -> transformers' name; GPT-2's own names are attribute-mapped by its config class, except the MLP's.
_SIZES = {
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
_RENAMED = {
    "gpt2": {
        "hidden_size": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "intermediate_size": "n_inner",
        "max_positions": "n_positions",
    }
}
_NO_KV_HEADS = frozenset({"gpt2"})
_WIDE_MLP = frozenset({"gpt2", "phi"})  # two matrices of 4 x hidden_size; gated MLPs have three of 8/3
# Activation dropout makes a run depend on the number of ranks: it is off unless requested.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout")


def make_config(
    architecture: str,
    *,
    hidden_size: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    intermediate_size: int | None = None,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    tie_embeddings: bool = False,
    extra: dict[str, Any] | None = None,
) -> Any:
    """Return the transformers config of ``architecture`` with these sizes; None leaves transformers' default.

    Args:
        architecture: a transformers model type with a causal language model ("llama", "gemma3_text", …).
        intermediate_size: default 8/3 of hidden_size (4 of it for gpt2 and phi), rounded up to a multiple of 64.
        extra: further keywords of the config class, by transformers' names.

    Raises:
        ModelError: an unknown architecture or keyword, or sizes that do not fit together.
    """
    config_class = _config_class(architecture)
    if kv_heads is None:
        kv_heads = heads
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise ModelError(f"heads={heads} is not a multiple of kv_heads={kv_heads}; choose kv_heads that divides heads")
    if heads is not None and hidden_size is not None and head_dim is None and hidden_size % heads:
        raise ModelError(f"hidden_size={hidden_size} is not a multiple of heads={heads}; change one or give head_dim")
    if architecture in _NO_KV_HEADS and kv_heads != heads:
        raise ModelError(f"{architecture} has no grouped-query attention: leave out kv_heads={kv_heads}")
    if intermediate_size is None and hidden_size is not None:
        exact = 4 * hidden_size if architecture in _WIDE_MLP else -(-8 * hidden_size // 3)
        intermediate_size = -(-exact // 64) * 64
    if head_dim is None and hidden_size is not None and heads is not None:
        head_dim = hidden_size // heads
    given = {
        "hidden_size": hidden_size, "layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        "intermediate_size": intermediate_size, "vocab_size": vocab_size, "max_positions": max_positions,
    }  # fmt: skip
    known = known_keys(config_class)
    arguments: dict[str, Any] = {name: 0.0 for name in _DROPOUTS if name in known}
    for size, value in given.items():
        name = _RENAMED.get(architecture, {}).get(size, _SIZES[size])
        if value is not None and name in known:
            arguments[name] = value
    if "head_dim" not in known and None not in (head_dim, heads, hidden_size) and head_dim != hidden_size // heads:  # type: ignore[operator]
        raise ModelError(f"{architecture} has no head_dim of its own: it is hidden_size / heads, leave head_dim out")
    arguments["tie_word_embeddings"] = tie_embeddings
    arguments.update(_checked(extra or {}, known, architecture))
    if vocab_size is not None:
        # transformers' defaults are ids that a small vocabulary does not have
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            arguments.setdefault(token, None)
    try:
        return config_class(**arguments)
    except REFUSALS as problem:
        raise ModelError(f"transformers rejects this {architecture} config: {problem}") from problem


def known_keys(config_class: type) -> set[str]:
    """Return the keyword arguments that a transformers config class declares, with its attribute-mapped names."""
    names = {field.name for field in dataclasses.fields(config_class)}
    names |= set(getattr(config_class, "attribute_map", {}))
    return {name for name in names if not name.startswith("_")}


def _config_class(architecture: str) -> type:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or architecture not in CONFIG_MAPPING:
        near = difflib.get_close_matches(architecture, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelError(f"architecture {architecture!r} is no causal language model of transformers{hint}")
    return CONFIG_MAPPING[architecture]


def _checked(extra: dict[str, Any], known: set[str], architecture: str) -> dict[str, Any]:
    allowed = known | {"rope_scaling", "rope_theta"}
    for key in extra:
        if key not in allowed:
            near = difflib.get_close_matches(key, sorted(allowed), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ModelError(f"extra key {key!r} is not in transformers' config of {architecture}{hint}")
    return extra

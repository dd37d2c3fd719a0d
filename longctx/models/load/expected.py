"""Check that a folder's weights match its config.json: names and shapes, without torch.

For every language model: rows of the embedding and of the output layer, and the number of layers. For plain Llama-like
models and GPT-2: every weight of every layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from longctx.models.load.headers import Weight
from longctx.models.load.settings import text_settings, whole_number
from longctx.models.names import PREFIX

PLAIN = frozenset(
    {"llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "smollm3"}
)
"""architectures whose layers all have q, k, v and o projections, and an MLP of gate, up and down"""
_TIED = frozenset(
    "bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert cohere "
    "cohere2 cohere2_moe cohere_compass_text cpmant ctrl data2vec-text electra ernie ernie4_5 ernie4_5_moe falcon "
    "falcon_mamba gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text gpt-sw3 gpt2 gpt_bigcode "
    "gpt_neo gpt_neox_japanese granite_swa jetmoe lfm2 lfm2_moe lfm3 mamba marian mbart megatron-bert minicpm3 "
    "modernbert-decoder mpt mvp openai-gpt opt pegasus plbart prophetnet recurrent_gemma roberta roberta-prelayernorm "
    "roc_bert roformer smollm3 starcoder2 trocr vaultgemma whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod "
    "youtu zamba zamba2 zaya".split()
)
"""model types whose class shares embedding and output layer unless config.json says otherwise"""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.(.+)$")
_EMBEDDINGS = re.compile(r"(?:^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|tokens_embed)\.weight$")
_HEADS = re.compile(r"(?:^|\.)(lm_head|embed_out)\.weight$")
_FLOATS = ("F64", "F32", "F16", "BF16")


def tied(settings: dict[str, Any]) -> bool:
    """Return whether the output layer shares the embedding's weights; by default, as the class does."""
    given = settings.get("tie_word_embeddings")
    kind = str(settings.get("model_type")).removeprefix(PREFIX)
    return bool(given) if isinstance(given, bool) else kind in _TIED


def count_parameters(settings: dict[str, Any], weights: dict[str, Weight]) -> int:
    """Return the number of parameters of a folder's model, without extra layers for multi-token prediction and without
    a second copy of a tied embedding."""
    settings = text_settings(settings)
    count, total = whole_number(settings, "num_hidden_layers", "n_layer", "n_layers", "num_layers"), 0
    for name, weight in weights.items():
        layer = _LAYER.search(name)
        if not (layer and count and int(layer[1]) >= count) and not (tied(settings) and _HEADS.search(name)):
            total += weight.numbers
    return total


def mismatches(settings: dict[str, Any], weights: dict[str, Weight]) -> Iterator[str]:
    """Yield one sentence per mismatch between ``weights`` and the model that ``settings`` describe, the worst first.

    Args:
        settings: the content of config.json.
        weights: what ``read_weights`` returned.
    """
    settings = text_settings(settings)
    odd = next((name for name, it in weights.items() if name.endswith("weight") and it.dtype not in _FLOATS), None)
    if odd is not None:
        yield f"{odd} is stored as {weights[odd].dtype}: quantised weights cannot be trained; give the original ones"
        return
    yield from _ends(settings, weights)
    layers = _by_layer(weights)
    yield from _layer_count(settings, layers)
    kind = str(settings.get("model_type")).removeprefix(PREFIX)
    shapes = _gpt2(settings) if kind == "gpt2" else _plain(settings, kind) if kind in PLAIN else {}
    converted = kind != settings.get("model_type")  # its layers may have other weights besides
    common = _common(layers) - set(shapes) if shapes and not converted else set()
    for index, found in sorted(layers.items()):
        yield from _layer(index, found, shapes)
        yield from (f"layer {index} lacks {name}, which other layers have" for name in sorted(common - set(found)))


def _ends(settings: dict[str, Any], weights: dict[str, Weight]) -> Iterator[str]:
    rows = whole_number(settings, "vocab_size")
    embeddings = [name for name in weights if _EMBEDDINGS.search(name)]
    heads = [name for name in weights if _HEADS.search(name)]
    for name in [*embeddings, *heads]:
        shape = weights[name].shape
        if rows is not None and shape and shape[0] != rows:
            yield f"{name} has {shape[0]:,} rows, but config.json says vocab_size {rows:,}"
    kind = str(settings.get("model_type")).removeprefix(PREFIX)
    if kind in PLAIN or kind == "gpt2":
        if not embeddings:
            yield "there is no embedding among the weights; give a folder with the whole model"
        if not heads and not tied(settings):
            yield "there is no lm_head.weight, and tie_word_embeddings is not set; give the folder of a causal model"


def _layer_count(settings: dict[str, Any], layers: dict[int, dict[str, Weight]]) -> Iterator[str]:
    count = whole_number(settings, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if count is None or not layers:
        return
    further = whole_number(settings, "num_nextn_predict_layers", "mtp_num_hidden_layers") or 0
    missing = sorted(set(range(count)) - set(layers))
    if missing and missing != list(range(count)):
        yield f"config.json says {count} layers, but the weights of layer {missing[0]} are not there"
    extra = [index for index in layers if index >= count + further]
    if extra:
        yield f"config.json says {count} layers, but there are weights of layer {max(extra)}"


def _layer(index: int, found: dict[str, Weight], shapes: dict[str, tuple[int | None, ...]]) -> Iterator[str]:
    for name, shape in shapes.items():
        if name not in found:
            yield f"layer {index} lacks {name}"
        elif len(shape) != len(found[name].shape) or any(
            want not in (None, got) for want, got in zip(shape, found[name].shape, strict=True)
        ):
            given = " x ".join(map(str, found[name].shape))
            yield f"{name} of layer {index} is {given}, but config.json asks for {' x '.join(map(str, shape))}"


def _by_layer(weights: dict[str, Weight]) -> dict[int, dict[str, Weight]]:
    """Group weights by layer, by their names within the layer."""
    found: dict[int, dict[str, Weight]] = {}
    for name, weight in weights.items():
        match = _LAYER.search(name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = weight
    return found


def _common(layers: dict[int, dict[str, Weight]]) -> set[str]:
    """Return the names that more than half of the layers have."""
    counts: dict[str, int] = {}
    for found in layers.values():
        for name in found:
            counts[name] = counts.get(name, 0) + 1
    return {name for name, count in counts.items() if 2 * count > len(layers)}


def _plain(settings: dict[str, Any], kind: str) -> dict[str, tuple[int | None, ...]]:
    hidden, heads = whole_number(settings, "hidden_size"), whole_number(settings, "num_attention_heads")
    inner = whole_number(settings, "intermediate_size")
    if hidden is None or heads is None or inner is None:
        return {}
    size = whole_number(settings, "head_dim")
    if size is None and (kind.startswith("gemma") or kind == "qwen3"):
        return {}  # their classes have a default of their own
    size = size or hidden // heads
    queries = heads * size
    groups = whole_number(settings, "num_key_value_heads") or (heads if kind in ("llama", "olmo", "olmo2") else None)
    keys = groups and groups * size  # None: the class has a default of its own
    projections: dict[str, tuple[int | None, ...]] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    return projections


def _gpt2(settings: dict[str, Any]) -> dict[str, tuple[int | None, ...]]:
    hidden = whole_number(settings, "n_embd", "hidden_size")
    if hidden is None:
        return {}
    inner = whole_number(settings, "n_inner", "intermediate_size") or 4 * hidden
    return {
        "attn.c_attn.weight": (hidden, 3 * hidden),
        "attn.c_proj.weight": (hidden, hidden),
        "mlp.c_fc.weight": (hidden, inner),
        "mlp.c_proj.weight": (inner, hidden),
    }

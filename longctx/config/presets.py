"""Presets: what `longctx init --preset` writes, and the files of `configs/`."""

from __future__ import annotations

from typing import Any, NamedTuple

from longctx.config.write import template


class Preset(NamedTuple):
    """A named set of values."""

    file: str
    """model_length_parallelism_hardware.yaml"""
    about: str
    values: dict[str, Any]


def _preset(file: str, about: str, steps: int, lr: float, **values: Any) -> Preset:
    common: dict[str, Any] = {"train.steps": steps, "train.lr": lr, "train.warmup_steps": max(steps // 50, 10)}
    common |= {"output.folder": "runs/" + file.removesuffix(".yaml")}
    return Preset(file, about, {"data.sources": ("python-stdlib",), **common, **_dotted(values)})


def _dotted(values: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Turn section -> key -> value into "section.key" -> value; the raw block of DeepSpeed has the key ""."""
    return {f"{section}.{key}".rstrip("."): value for section, block in values.items() for key, value in block.items()}


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads}
    return {"architecture": "llama", **sizes, **more}


_LARGE: dict[str, Any] = {"dtype": "bf16"}
_FRUGAL: dict[str, Any] = {"mlp_tile": "auto", "recompute": "layer_keep_attention", "recompute_norms": True}

# Llama 3 8B. DeepSpeed's buckets take 2 GB and more by default; these are as small as throughput allows.
_EIGHT = _llama(
    4096,
    32,
    32,
    8,
    intermediate_size=14_336,
    rope={"rope_type": "default", "rope_theta": 5e7},
    **_LARGE,
)
_EIGHT_DATA: dict[str, Any] = {"vocab_size": 65_536, "packing": "best_fit"}
_SMALL_BUCKETS: dict[str, Any] = {"reduce_bucket_size": 50_000_000, "stage3_max_live_parameters": 100_000_000}
_LONGEST: dict[str, Any] = {"mlp_tile": "auto", "recompute": "layer", "recompute_norms": True}


def _longest(file: str, about: str, length: int, ring: int, **zero: Any) -> Preset:
    """Llama 3 8B at the longest length that fits according to `longctx plan`."""
    return _preset(
        file,
        about,
        200,
        1e-4,
        model=_EIGHT,
        mesh={"ring": ring, "data": 1},
        data={"sequence_length": length, **_EIGHT_DATA},
        memory=_LONGEST,
        zero={"stage": 3, **zero},
        checkpoint={"every": 20},
        deepspeed={"": {"zero_optimization": _SMALL_BUCKETS}},
    )


PRESETS = {
    "cpu-tiny": _preset(
        "llama-1m_4k_ring2-zero3_cpu.yaml",
        "A million parameters, 4K tokens over a ring of 2 processes: runs anywhere in a minute or two.",
        30,
        2e-3,
        model=_llama(128, 2, 4, 2, tie_embeddings=True),
        mesh={"ring": 2},
        data={"sequence_length": 4096, "vocab_size": 4096, "sample_bytes": 2_000_000},
        train={"eval_every": 10, "eval_batches": 4},
    ),
    "cpu-hybrid": _preset(
        "llama-hybrid-2m_4k_ring2-zero3_cpu.yaml",
        "Three layers of bounded attention (ABC, 64 slots) per layer of exact attention, over a ring of 2 processes.",
        30,
        2e-3,
        model=_llama(128, 4, 4, 2, tie_embeddings=True),
        mesh={"ring": 2},
        attention={"layers": {"*": {"abc": {"slots": 64}}, "3": "ring"}},
        data={"sequence_length": 4096, "vocab_size": 4096, "sample_bytes": 2_000_000},
        train={"eval_every": 10, "eval_batches": 4},
    ),
    "1-gpu-32k": _preset(
        "llama-300m_32k_zero1-offload_1-gpu.yaml",
        "300 million parameters, 32K tokens on one GPU; optimizer states in host memory.",
        2000,
        6e-4,
        model=_llama(1024, 20, 16, 4, **_LARGE),
        mesh={"ring": 1, "data": 1},
        data={"sequence_length": 32_768, "vocab_size": 32_768, "packing": "best_fit"},
        train={"global_batch": 8, "eval_every": 200},
        memory=_FRUGAL,
        zero={"stage": 1, "offload_optimizer": "cpu"},
        checkpoint={"every": 200},
    ),
    "8-gpu-256k": _preset(
        "llama-1b_256k_ring8-zero3_8-gpu.yaml",
        "A billion parameters, 256K tokens over a ring of 8 GPUs, ZeRO-3.",
        2000,
        4e-4,
        model=_llama(2048, 20, 32, 8, rope={"rope_type": "default", "rope_theta": 5e6}, **_LARGE),
        mesh={"ring": 8, "data": 1},
        data={"sequence_length": 262_144, "vocab_size": 32_768, "packing": "best_fit"},
        train={"global_batch": 4, "eval_every": 100},
        memory=_FRUGAL,
        zero={"stage": 3, "overlap_comm": True},
        checkpoint={"every": 100},
    ),
    "64-gpu-1M": _preset(
        "llama-8b_1m_ring64-zero3_64-gpu.yaml",
        "Eight billion parameters, 1M tokens over a ring of 64 GPUs, ZeRO-3.",
        1000,
        3e-4,
        model=_EIGHT,
        mesh={"ring": 64, "data": 1},
        data={"sequence_length": 1_048_576, **_EIGHT_DATA},
        train={"global_batch": 4, "eval_every": 50},
        memory=_FRUGAL,
        zero={"stage": 3, "overlap_comm": True},
        checkpoint={"every": 50},
    ),
    "1-gpu-8B": _longest(
        "llama-8b_128k_zero3-offload_1-h100.yaml",
        "Eight billion parameters, 128K tokens on one GPU of 80 GB; optimizer states in 140 GiB of host memory.\n"
        "memory.offload_checkpoints allows longer rows: `longctx plan` says how long.",
        131_072,
        1,
        offload_optimizer="cpu",
    ),
    "8-gpu-1M": _longest(
        "llama-8b_1m_ring8-zero3_8-h100.yaml",
        "Eight billion parameters, 1M tokens on one node of eight GPUs of 80 GB.\n"
        "Within a node, Ulysses works as well: mesh: {ring: 1, ulysses: 8}.",
        1_048_576,
        8,
        overlap_comm=True,
    ),
    "32-gpu-8M": _longest(
        "llama-8b_8m_ring32-zero3_32-h200.yaml",
        "Eight billion parameters, 8M tokens on four nodes of eight GPUs of 141 GB. GPUs of 80 GB suffice with\n"
        "memory.offload_checkpoints; mesh: {ring: 4, ulysses: 8} sends less between nodes.\n"
        "`longctx plan` assumes 80 GB unless given --machine h200.",
        8_388_608,
        32,
        overlap_comm=True,
    ),
    "128-gpu-32M": _longest(
        "llama-8b_32m_ring128-zero3_128-h200.yaml",
        "Eight billion parameters, 32M tokens on sixteen nodes of eight GPUs of 141 GB; a step takes hours. GPUs of\n"
        "80 GB suffice with memory.offload_checkpoints; mesh: {ring: 16, ulysses: 8} sends less between nodes.\n"
        "`longctx plan` assumes 80 GB unless given --machine h200.",
        33_554_432,
        128,
        overlap_comm=True,
    ),
}
"""name -> preset; the values are starting points, not tuned ones"""


def render(name: str, *, full: bool = False) -> str:
    """Return the commented YAML of a preset; ``full``: with every other key, commented out, at its default."""
    preset = PRESETS[name]
    title = (
        f"{preset.about}\nWritten by `longctx init --preset {name}`. `longctx explain FILE` shows every key with its "
        "value and meaning,\n`longctx init --full` writes them all out."
    )
    return template(preset.values, title, full=full)

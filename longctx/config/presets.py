"""Starting points: what `longctx init --preset` writes, and what stands in `configs/` under a speaking file name."""

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
    return {f"{section}.{key}": value for section, block in values.items() for key, value in block.items()}


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads}
    return {"architecture": "llama", **sizes, **more}


_LARGE: dict[str, Any] = {"dtype": "bf16"}
_FRUGAL: dict[str, Any] = {"mlp_tile": "auto", "recompute": "layer_keep_attention"}

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
        "Three layers of bounded memory (ABC, 64 slots) for each of exact attention, over a ring of 2 processes.",
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
        model=_llama(2048, 20, 32, 8, extra={"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, **_LARGE),
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
        model=_llama(
            4096,
            32,
            32,
            8,
            intermediate_size=14_336,
            extra={"rope_parameters": {"rope_type": "default", "rope_theta": 5e7}},
            **_LARGE,
        ),
        mesh={"ring": 64, "data": 1},
        data={"sequence_length": 1_048_576, "vocab_size": 65_536, "packing": "best_fit"},
        train={"global_batch": 4, "eval_every": 50},
        memory=_FRUGAL,
        zero={"stage": 3, "overlap_comm": True},
        checkpoint={"every": 50},
    ),
}
"""name -> preset; the values are starting points, not tuned ones"""


def render(name: str) -> str:
    """Return the commented YAML of a preset."""
    preset = PRESETS[name]
    title = (
        f"{preset.about}\nWritten by `longctx init --preset {name}`; `longctx explain FILE` says what each key means."
    )
    return template(preset.values, title)

"""Load a pretrained model from a local folder: safetensors only, nothing downloaded, nothing in the folder executed.

A config.json is untrusted input. Some of its fields have led transformers to execute code (``auto_map``;
``_attn_implementation_internal`` of CVE-2026-4372 named a kernel repository). So a config is built only from keys that
its class declares; dangerous keys are rejected, others are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longctx.errors import ModelError
from longctx.models.load.classes import require_causal
from longctx.models.load.headers import read_weights, weight_files
from longctx.models.load.read_keys import accepted_keys
from longctx.models.load.scratch import REFUSALS
from longctx.models.load.settings import read_settings
from longctx.models.names import NAME


def read_config(folder: str | Path, changes: dict[str, Any] | None = None) -> Any:
    """Return the transformers config of a local pretrained folder, as ``AutoConfig`` would, from its class's own keys.

    Args:
        changes: overrides for keys of config.json, such as ``{"max_position_embeddings": 131072}``.

    Raises:
        ModelError: no such folder, no or broken config.json, an unknown architecture, or a rejected key.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from longctx.models.register import register

    register()  # for the model types of converted models
    path = Path(folder) / "config.json"
    raw = _floats(read_settings(folder))
    if changes:
        raw = _changed(raw, changes)
    kind = raw.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(f"{path}: model_type {kind!r} is no architecture of the installed transformers")
    if kind == "mistral" and "layer_types" in raw:
        kind = "ministral"  # as AutoConfig does: Mistral's own class has one layer type
    config_class: Any = CONFIG_MAPPING[kind]
    known = accepted_keys(config_class)
    try:
        config = config_class.from_dict({key: value for key, value in raw.items() if key in known})
    except (*REFUSALS, ImportError) as problem:
        raise ModelError(f"{path}: transformers rejects this {kind} config: {problem}") from problem
    return config


def stored_dtype(folder: str | Path, config: Any) -> Any:
    """Return the torch dtype of a folder's weights: the one in its config, else that of the first weight.

    Raises:
        ModelError: see ``read_weights``.
    """
    import torch

    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    kinds = (weight.dtype for _, weight in sorted(read_weights(folder).items()))
    return next((known[kind] for kind in kinds if kind in known), torch.float32)


def load_pretrained(folder: str | Path, *, dtype: Any = None, config: Any = None) -> Any:
    """Return the causal language model of a local folder, with longctx's attention and its weights.

    Args:
        dtype: torch dtype of the weights; None keeps the folder's.
        config: the result of ``read_config``, if it was already read (and changed). If it is a converted config,
            weights of its layers that the folder lacks are initialised at random.

    Raises:
        ModelError: see ``read_config`` and ``weight_files``; or a weight is missing or has another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from longctx.models.convert import converted
    from longctx.models.hook.bounded_layer import CHILD
    from longctx.models.register import register

    register()
    loader: Any = AutoModelForCausalLM
    config = read_config(folder) if config is None else config
    require_causal(read_settings(folder), str(folder))
    weight_files(folder)
    if dtype is None:
        dtype = stored_dtype(folder, config)
    try:
        model, report = loader.from_pretrained(
            str(folder), config=config, dtype=dtype, attn_implementation=NAME, local_files_only=True,
            use_safetensors=True, trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    except (RuntimeError, OSError, ValueError, SafetensorError) as problem:
        raise ModelError(f"{folder} cannot be loaded: {problem}") from problem
    new = f".{CHILD}." if converted(config) and not converted(read_config(folder)) else None
    missing = sorted(key for key in report["missing_keys"] if new is None or new not in key)
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}")
    return model


def make_model(config: Any, *, dtype: Any = None) -> Any:
    """Return a causal language model with random weights and longctx's attention, built from a config.

    Inside ``deepspeed.zero.Init`` it is built partitioned.
    """
    from transformers import AutoModelForCausalLM

    from longctx.models.register import register

    register()
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME, trust_remote_code=False)


def _changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with overrides; new RoPE parameters replace all old ones except the base."""
    new = {**raw, **changes}
    if "rope_parameters" in changes:
        new.pop("rope_scaling", None)
        base = new.pop("rope_theta", None)
        for key in ("rope_scaling", "rope_parameters"):
            block = raw.get(key)
            base = block.get("rope_theta", base) if isinstance(block, dict) else base
        if base is not None and not any(isinstance(value, dict) for value in changes["rope_parameters"].values()):
            new["rope_parameters"] = {"rope_theta": base, **changes["rope_parameters"]}
    return new


def _floats(value: Any) -> Any:
    """Decode infinity and NaN as transformers writes them into JSON: ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _floats(inner) for key, inner in value.items()}
    return [_floats(inner) for inner in value] if isinstance(value, list) else value

"""A pretrained model from a local folder: safetensors only, nothing downloaded, nothing in the folder executed.

A config.json is input from a stranger. transformers has followed fields of it to code before (``auto_map``; the field
``_attn_implementation_internal`` of CVE-2026-4372 named a kernel repository), so a config is built from keys that its
class declares, dangerous ones are refused, and the rest is left out.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from longctx.errors import ModelError
from longctx.models.scratch import REFUSALS, known_keys

_REFUSED = {
    "auto_map": "names Python code to run; convert the model to an architecture of transformers",
    "custom_pipelines": "names Python code to run",
    "trust_remote_code": "asks for code to be run",
    "attn_implementation": "chooses an attention implementation, which is longctx's to choose",
    "experts_implementation": "chooses an implementation that may be downloaded",
    "kernel_config": "names kernels to download",
    "quantization_config": "quantised weights cannot be trained here; give the original weights",
    "per_layer_config": "a config per layer is not supported",
}
_IMPLEMENTATION = re.compile(r"^_(attn|attention|experts|kernel).*")  # CVE-2026-4372's field and its like
_ALWAYS_KNOWN = frozenset({"rope_scaling", "rope_theta", "torch_dtype", "dtype", "num_labels"})


def read_config(folder: str | Path) -> Any:
    """Return the transformers config of a local pretrained folder, built from declared keys only.

    Raises:
        ModelError: no such folder, no or broken config.json, an unknown architecture, or a refused key.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from longctx.models.register import register

    register()  # converted models have types of their own
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json there; give a local folder that save_pretrained wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ModelError(f"{path} is not valid JSON: {problem}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds {type(raw).__name__}, not an object")
    _refuse_keys(raw, str(path))
    kind = raw.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(f"{path}: model_type {kind!r} is no architecture of the installed transformers")
    config_class = CONFIG_MAPPING[kind]
    declared = {field.name for field in dataclasses.fields(config_class)}  # some are private: _sliding_window_pattern
    known = known_keys(config_class) | declared | _ALWAYS_KNOWN
    try:
        config = config_class.from_dict({key: value for key, value in raw.items() if key in known})
    except REFUSALS as problem:
        raise ModelError(f"{path}: transformers refuses this {kind} config: {problem}") from problem
    return config


def weight_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files of a pretrained folder, in order.

    Raises:
        ModelError: there are none, one is missing, a name leaves the folder, or the folder is an adapter.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter to another model; merge them and give the merged folder")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        other = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
        also = f" ({', '.join(sorted(other)[:3])} may run code when loaded, and is not read)" if other else ""
        raise ModelError(f"{folder}: no model.safetensors, no model.safetensors.index.json{also}; save as safetensors")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as problem:
        raise ModelError(f"{index} is no index of safetensors files: {problem}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}: every file must be a .safetensors in the same folder")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing, though {index.name} names it")
    return [folder / name for name in names]


def stored_dtype(folder: str | Path, config: Any) -> Any:
    """Return the torch dtype of a folder's weights: what its config says, else that of the first in its first file.

    Raises:
        ModelError: see ``weight_files``.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    try:
        with safe_open(weight_files(folder)[0], framework="pt") as file:
            kinds = (file.get_slice(name).get_dtype() for name in sorted(file.keys()))
            known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
            return next((known[kind] for kind in kinds if kind in known), torch.float32)
    except (OSError, SafetensorError) as problem:
        raise ModelError(f"{folder} cannot be loaded: {problem}") from problem


def load_pretrained(folder: str | Path, *, dtype: Any = None, config: Any = None) -> Any:
    """Return the causal language model of a local folder, with longctx's attention and its weights.

    Args:
        dtype: torch dtype of the weights; None keeps the folder's.
        config: what ``read_config`` returned, if it has been read (and changed) already. If it has been converted, the
            weights that the folder lacks for its layers are drawn at random.

    Raises:
        ModelError: see ``read_config`` and ``weight_files``; or a weight is missing or has another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from longctx.models.convert import converted
    from longctx.models.memories import CHILD
    from longctx.models.register import NAME, register

    register()
    loader: Any = AutoModelForCausalLM
    config = read_config(folder) if config is None else config
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

    Run it inside ``deepspeed.zero.Init`` to build it partitioned.
    """
    from transformers import AutoModelForCausalLM

    from longctx.models.register import NAME, register

    register()
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME, trust_remote_code=False)


def _refuse_keys(raw: dict[str, Any], where: str) -> None:
    """Refuse keys that lead to code or downloads, at any depth."""
    for key, value in raw.items():
        if key in _REFUSED and value not in (None, False):
            raise ModelError(f"{where}: {key!r} {_REFUSED[key]}")
        if _IMPLEMENTATION.search(key):
            raise ModelError(
                f"{where}: private key {key!r} chooses an implementation, which may be downloaded; remove it"
            )
        if isinstance(value, dict):
            _refuse_keys(value, where)

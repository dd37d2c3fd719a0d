"""LoRA adapters through PEFT: added to a model, merged into the weights of its folder, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longctx.errors import MissingPackageError, ModelError

CONFIG = "adapter_config.json"


def adapter_config(
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("all-linear",),
    modules_to_save: tuple[str, ...] = (),
    rslora: bool = False,
) -> Any:
    """Return PEFT's configuration of the adapters of a causal language model.

    Raises:
        MissingPackageError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise MissingPackageError("model.lora needs the package peft: pip install 'longctx[peft]'") from None
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank, whatever its type
        lora_dropout=dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        modules_to_save=list(modules_to_save) or None,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )


def add_adapters(model: Any, config: Any, folder: str) -> Any:
    """Return the PeftModel of ``model``, whose own weights are frozen; adapters have their dtype.

    New weights are drawn from torch's generator, so seed it. Weights may be partitioned by ZeRO-3.

    Args:
        config: the result of ``adapter_config``.
        folder: of the model, which an exported adapter names.

    Raises:
        ModelError: PEFT rejects the configuration, or no module has the name of a target.
    """
    from peft import get_peft_model

    config.base_model_name_or_path = model.name_or_path = folder
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as problem:
        raise ModelError(f"model.lora: PEFT rejects it for {type(model).__name__}: {problem}") from None


def merged(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """Return the transformers model inside a PeftModel, with adapters of other values merged into its weights.

    Args:
        model: a whole PeftModel, on one device; it is used up.
        weights: of the adapters and modules that were trained, by their names in ``model``.
    """
    _load(model, weights)
    inner = model.merge_and_unload()
    for parameter in inner.parameters():
        parameter.requires_grad_(False)
    return inner


def save_adapter(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which ``PeftModel.from_pretrained`` loads.

    Args:
        model: a PeftModel; its own weights are not read.
        weights: as for ``merged``.
    """
    # the base's own embeddings stay with the base: an embedding that is trained is among `modules_to_save`
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's is a form to fill in


def _load(model: Any, weights: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = sorted(set(weights) - set(parameters) - {name for name, _ in model.named_buffers()})
    if unknown:
        raise ModelError(f"the adapters have weights that the model lacks, first {unknown[0]}")
    with torch.no_grad():
        for name, value in weights.items():
            if name in parameters and parameters[name].requires_grad:
                parameters[name].copy_(value)

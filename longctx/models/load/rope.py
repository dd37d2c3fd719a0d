"""The RoPE parameters of a config.json, in the old or the new spelling of transformers, flat or per layer type."""

from __future__ import annotations

from typing import Any

from longctx.models.names import PREFIX

GLOBAL = "full_attention"
_BY_LAYER_TYPE = frozenset({"gemma3_text", "gemma3n_text", "gemma4_text", "modernbert-decoder"})


def by_layer_type(settings: dict[str, Any]) -> bool:
    """Return whether the model has other RoPE parameters in layers with a sliding window than in the others."""
    block = settings.get("rope_parameters")
    nested = isinstance(block, dict) and isinstance(block.get(GLOBAL), dict)
    return nested or str(settings.get("model_type")).removeprefix(PREFIX) in _BY_LAYER_TYPE


def rope_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the RoPE parameters of layers that attend to the whole row, by their new names; {} if none are given."""
    found = next((b for key in ("rope_parameters", "rope_scaling") if isinstance(b := settings.get(key), dict)), {})
    found = dict(found[GLOBAL] if isinstance(found.get(GLOBAL), dict) else found)
    if "type" in found:
        found.setdefault("rope_type", found.pop("type"))
    for key in ("rope_theta", "original_max_position_embeddings"):
        if key not in found and settings.get(key) is not None:
            found[key] = settings[key]
    return {key: value for key, value in found.items() if value is not None}


def rope_changes(settings: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of config.json that give these RoPE parameters to layers that attend to the whole row."""
    changes: dict[str, Any] = {"rope_parameters": parameters}
    if by_layer_type(settings):
        old = settings.get("rope_parameters")
        others = {key: value for key, value in old.items() if isinstance(value, dict)} if isinstance(old, dict) else {}
        changes = {"rope_parameters": {**others, GLOBAL: parameters}}
    if "original_max_position_embeddings" in settings and "original_max_position_embeddings" in parameters:
        changes["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]  # Phi 3 reads it
    return changes

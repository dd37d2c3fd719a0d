"""Map model types to transformers classes per task, from transformers' own tables, without importing transformers.

Importing transformers' tables imports torch, which takes seconds; the tables are literals in one source file, which is
parsed instead.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from longctx.errors import ModelError
from longctx.models.names import PREFIX

_DECODERS = frozenset({"bart", "mbart", "mvp", "reformer", "xlm"})  # types with a causal class of another kind
_SUFFIX = "_MAPPING_NAMES"


@cache
def tables() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return {task: {model type: class names}} of the installed transformers; empty without it.

    Tasks are named as in transformers: ``MODEL_FOR_CAUSAL_LM``, ``MODEL``, ….
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            if name.endswith(_SUFFIX) and isinstance(value, ast.Call) and value.args:
                found[name.removesuffix(_SUFFIX)] = _pairs(value.args[0])
    return found


def require_causal(settings: dict[str, Any], where: str) -> None:
    """Reject the config.json of any model but a causal language model, by the name of its class.

    Args:
        settings: the content of config.json.
        where: the folder, for the message.

    Raises:
        ModelError: an encoder-decoder, a classifier, a vision-language or another composite model, or a type for which
            transformers has no causal language model.
    """
    kind, causal = settings.get("model_type"), tables().get("MODEL_FOR_CAUSAL_LM", {})
    if not causal:
        return  # transformers is missing or has another layout: loading reports it
    if not isinstance(kind, str):
        raise ModelError(f"{where}: its config.json has no model_type; give a transformers folder")
    plain = kind.removeprefix(PREFIX)
    named = settings.get("architectures")
    classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    own = classes[0] if classes else kind
    if settings.get("is_encoder_decoder") is True:
        raise ModelError(f"{where} holds {own}, an encoder-decoder; only causal language models are trained here")
    if plain not in causal:
        raise ModelError(
            f"{where} holds {own}, and transformers has no causal language model of type {kind!r}; give a folder of one"
        )
    _require_left_to_right(settings, plain, f"{where} holds {own}")
    parts = [key for key in settings if key.endswith("_config") and isinstance(settings[key], dict)]
    composite = [key for key in parts if key.startswith(("text", "vision", "audio", "thinker", "talker"))]
    if composite or causal[plain][0].endswith("ForConditionalGeneration"):
        raise ModelError(
            f"{where} holds {own}, which also reads images or sound; only language models are trained here: save its "
            f"language model alone ({plain}_text, say) and give that folder"
        )
    allowed = {*causal[plain], *tables().get("MODEL", {}).get(plain, ())}
    if kind == plain and classes and not allowed & set(classes):
        raise ModelError(
            f"{where} holds {own}, not a causal language model; give a folder of {' or '.join(causal[plain])}"
        )


def _require_left_to_right(settings: dict[str, Any], kind: str, who: str) -> None:
    """Reject encoders: with a causal head they predict a token from itself unless ``is_decoder`` is set."""
    masked = kind in tables().get("MODEL_FOR_MASKED_LM", {}) and kind not in _DECODERS
    if masked and settings.get("is_decoder") is not True:
        raise ModelError(
            f"{who}, which attends to both sides of a token; to train it as a causal language model, write "
            '"is_decoder": true into its config.json'
        )


def _pairs(node: ast.expr) -> dict[str, tuple[str, ...]]:
    """Return the literal pairs of an ``OrderedDict([...])``; others are left out."""
    found: dict[str, tuple[str, ...]] = {}
    for item in node.elts if isinstance(node, ast.List) else []:
        try:
            kind, names = ast.literal_eval(item)
        except (ValueError, TypeError):
            continue
        found[kind] = (names,) if isinstance(names, str) else tuple(name for name in names if name)
    return found

"""Build the transformers model of the `model:` section: from architecture and sizes, or from a pretrained folder."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from longctx.config.architecture import pretrained_changes, transformers_keywords
from longctx.config.lora_rules import LORA_FREE
from longctx.config.schema import RunConfig
from longctx.engine.activations import ActivationSettings
from longctx.engine.build import build, seeded
from longctx.errors import ModelError
from longctx.mesh import Mesh
from longctx.models.convert import convert
from longctx.models.load.headers import fingerprint
from longctx.models.load.pretrained import read_config
from longctx.models.load.scratch import make_config
from longctx.models.lora import adapter_config, add_adapters


def model_config(
    config: RunConfig, vocabulary_size: int, end_of_document: int | None, beginning: int | None = None
) -> Any:
    """Return the transformers config of the run's model.

    Args:
        vocabulary_size: of the tokenizer; the embedding has as many rows unless `model.vocab_size` is larger.
        end_of_document: the tokenizer's id of the end of a document, at which generation stops.
        beginning: the tokenizer's id of the beginning of a text, if it has one.

    Raises:
        ModelError: the embedding is smaller than the tokenizer, or transformers rejects the sizes.
    """
    model = config.model
    if model.pretrained is not None:
        found = read_config(model.pretrained, pretrained_changes(config))
        fix = "use the model's own tokenizer (data.tokenizer)"
        _require_rows(found.vocab_size, vocabulary_size, f"{model.pretrained} has", fix)
        return _mixed(found, config)
    assert model.architecture is not None
    rows = model.vocab_size or vocabulary_size
    _require_rows(rows, vocabulary_size, "model.vocab_size gives", "raise it, or remove the key")
    keywords = transformers_keywords(config, vocabulary_size, end_of_document, beginning)
    return _mixed(make_config(model.architecture, tie_embeddings=model.tie_embeddings, extra=keywords), config)


def build_model(config: RunConfig, description: Any, settings: dict[str, Any], mesh: Mesh) -> torch.nn.Module:
    """Build the model: identical on every rank, and sharded as it is built under ZeRO-3.

    Args:
        description: returned by ``model_config``.
        settings: the run's DeepSpeed configuration.
    """
    folder = config.model.pretrained
    model: torch.nn.Module = build(
        folder or description,
        mesh,
        config=settings,
        seed=config.train.seed,
        layers=config.attention.layers if folder else None,  # without a folder the description contains them
        changes=pretrained_changes(config) if folder else None,
    )
    if config.model.lora is None:
        return model
    with seeded(config.train.seed):
        return adapted(model, config)


def adapted(model: Any, config: RunConfig) -> Any:
    """Return the PeftModel of a run's model with the adapters of `model.lora`."""
    lora = config.model.lora
    assert lora is not None and config.model.pretrained is not None
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    settings = adapter_config(lora.rank, alpha, lora.dropout, lora.targets, lora.modules_to_save, lora.rslora)
    return add_adapters(model, settings, config.model.pretrained)


def memory_of(config: RunConfig) -> ActivationSettings:
    """Return the engine's memory options from the `memory:` section."""
    memory = config.memory
    return ActivationSettings(
        loss_tile=None if memory.loss_tile == "none" else memory.loss_tile,
        loss_backend=memory.loss_backend,
        z_loss=memory.z_loss,
        recompute=memory.recompute,
        offload_checkpoints=memory.offload_checkpoints,
        recompute_norms=memory.recompute_norms,
        mlp_tile=None if memory.mlp_tile == "none" else memory.mlp_tile,
    )


def hash_of_model(config: RunConfig, description: Any) -> str:
    """Return a short hash of everything that determines the weights' shapes and meaning; resuming requires it equal."""
    newer = {
        key for key in ("rope", "lora") if getattr(config.model, key) is None
    }  # not in the hash of older checkpoints
    ours = config.model.model_dump(mode="json", exclude={"pretrained", "vocab_size", "max_positions", *newer})
    if config.model.lora is not None:  # a checkpoint holds the adapters only
        ours["lora"] = {key: value for key, value in ours["lora"].items() if key not in LORA_FREE}
        ours["base"] = fingerprint(config.model.pretrained or "")
    attention = [config.attention.window, *([config.attention.layers] if config.attention.layers else [])]
    facts = [ours, *attention, description.model_type, description.vocab_size, description.hidden_size]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _mixed(description: Any, config: RunConfig) -> Any:
    """Return the transformers config with the kinds of attention that `attention.layers` gives its layers."""
    return convert(description, config.attention.layers) if config.attention.layers else description


def _require_rows(rows: int, vocabulary_size: int, who: str, fix: str) -> None:
    if rows < vocabulary_size:
        raise ModelError(f"{who} an embedding of {rows} rows, but the tokenizer has {vocabulary_size} tokens; {fix}")

"""Propose the YAML of a run that continues a pretrained folder with longer rows on a named machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longctx.config.keys import leaves
from longctx.errors import ConfigError, ModelError
from longctx.models.load.headers import read_weights
from longctx.models.load.reach import Reach, reach_of
from longctx.models.load.rope import rope_of
from longctx.models.load.settings import read_settings
from longctx.plan.choose import Choice, choose
from longctx.plan.machines import GIB, Machine
from longctx.plan.memory import peak_bytes
from longctx.plan.setup import Setup, resolve_mlp_tile
from longctx.plan.shape import ModelShape, shape_of_settings

_BUCKET = "deepspeed.zero_optimization.reduce_bucket_size"


@dataclass(frozen=True)
class Proposal:
    """Keys of a YAML, a reason for each, and lines for the top of the file."""

    values: dict[str, Any]
    reasons: dict[str, str]
    title: str


def propose(folder: Path, machine: Machine, devices: int, length: int | None, sources: str) -> Proposal:
    """Return the keys that a run of ``folder`` on ``devices`` devices sets, and why; all others keep their defaults.

    Args:
        length: tokens per row; None for the folder's own positions.
        sources: of the text.

    Raises:
        ConfigError: the folder cannot be read or extended, or no settings fit.
    """
    on_gpu = machine.name != "cpu"
    try:
        settings, weights = read_settings(folder), read_weights(folder)
    except ModelError as problem:
        raise ConfigError(f"init --model: {problem}") from None
    reach = reach_of(settings, weights)
    length = length or (reach.positions if reach else 8192)
    parameters = sum(weight.numbers for weight in weights.values())
    shape = replace(shape_of_settings(settings, 2 if on_gpu else 4), counted=parameters)
    choice = _chosen(shape, length, machine, devices)
    values: dict[str, Any] = {"model.pretrained": str(folder)}
    reasons = {"model.pretrained": f"{parameters / 1e9:,.2f} G parameters; its own tokenizer is used"}
    for found, why in (
        _positions(settings, reach, length, str(folder)),
        _fixed(folder, length, sources, choice, on_gpu),
        _settings(shape, choice.setup, machine),
    ):
        values |= found
        reasons |= why
    return Proposal(values, reasons, _title(shape, choice, machine))


def _chosen(shape: ModelShape, length: int, machine: Machine, devices: int) -> Choice:
    start = Setup(length, on_gpu=machine.name != "cpu", overlap_comm=True, recompute_norms=True)
    for shorter in (length >> times for times in range(20)):
        try:
            found = choose(shape, shorter, machine, devices, start=start, offload_checkpoints=True)
        except ConfigError:
            continue
        if shorter == length:
            return found
        raise ConfigError(
            f"init --length {length}: no settings fit rows of {length:,} tokens on {devices} x {machine.name}, but "
            f"rows of {shorter:,} fit; lower --length, or raise --gpus"
        )
    raise ConfigError(
        f"init --model: the model does not fit on {devices} x {machine.name} with any settings; raise --gpus"
    )


def _positions(
    settings: dict[str, Any], reach: Reach | None, length: int, folder: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what extends the folder's positions to the row, if it must be."""
    if reach is None or length <= reach.positions:
        return {}, {}
    if reach.learned:
        raise ConfigError(
            f"init --length {length}: the {reach.positions:,} positions of {folder} are learned, which no setting "
            f"extends; use --length {reach.positions} or less"
        )
    old = rope_of(settings)
    kind, why = old.get("rope_type", "default"), f"extends the folder's {reach.positions:,} positions to {length:,}"
    block: dict[str, Any] = {"rope_type": "yarn" if kind == "default" else kind}
    if kind == "linear":
        block["factor"] = old.get("factor", 1.0) * length / reach.positions
    elif kind == "longrope":
        block |= {key: old[key] for key in ("short_factor", "long_factor") if key in old}
    if kind in ("yarn", "longrope") and "original_max_position_embeddings" not in old:
        block["original_max_position_embeddings"] = reach.positions
    return {"model.rope": block}, {"model.rope": f"{why}; `longctx explain model.rope` lists its keys"}


def _fixed(
    folder: Path, length: int, sources: str, choice: Choice, on_gpu: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what no prediction decides: starting points of data, optimizer and folders."""
    name = folder.resolve().name or "model"
    values: dict[str, Any] = {
        "data.sources": (sources,),
        "data.sequence_length": length,
        "data.packing": "best_fit",
        "train.steps": 1000,
        "train.lr": 2e-5,
        "train.warmup_steps": 50,
        "checkpoint.every": 100,
        "output.folder": f"runs/{name}-{length}",
    }
    reasons = {
        "data.sources": "your long documents",
        "data.packing": "keeps documents whole where they fit",
        "train.steps": f"a starting point: {1000 * length * choice.setup.data / 1e9:,.2f} G tokens",
        "train.lr": "a starting point for continued training; a model from scratch has about ten times as much",
        "checkpoint.every": "steps that a failure may cost",
    }
    if on_gpu:
        values["model.dtype"], reasons["model.dtype"] = "bf16", "halves weights and activations; fp32 master weights"
    return values, reasons


def _settings(shape: ModelShape, setup: Setup, machine: Machine) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the keys of a choice that differ from their defaults."""
    reasons = {
        "mesh.ring": f"{setup.local:,} tokens of a row on each rank",
        "mesh.ulysses": f"heads are exchanged within a node of {machine.per_node}, which costs less than a ring there",
        "mesh.data": "replicas; each has a row of its own in a step",
        "zero.stage": "what fits and is fastest, by `longctx plan`",
        "zero.offload_optimizer": "optimizer states do not fit on the device",
        "memory.recompute": "activations do not fit otherwise",
        "memory.offload_checkpoints": "what recomputation saves does not fit on the device",
        "memory.recompute_norms": "saves memory for about 1 % of the time",
        "memory.mlp_tile": "an MLP's intermediates exist for this many tokens at once",
        "zero.overlap_comm": "gradients are reduced while backward goes on",
        "zero.group": "weights are gathered within a node",
        "deepspeed": "DeepSpeed's buckets of 500 M elements take 2 GB",
    }
    chosen: dict[str, Any] = dict(Choice(setup, 0.0).yaml)
    bucket = chosen.pop(_BUCKET, None)
    if setup.mlp_tile == resolve_mlp_tile("auto", shape):
        chosen["memory.mlp_tile"] = "auto"
    del chosen["memory.loss_tile"]  # auto, the default
    if setup.stage:
        chosen["zero.overlap_comm"] = setup.overlap_comm
    always = ("mesh.ring", "mesh.data", "zero.stage")
    values = {key: value for key, value in chosen.items() if key in always or value != leaves()[key].default}
    if bucket is not None:
        values["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": bucket}}
    return values, {key: why for key, why in reasons.items() if key in values}


def _title(shape: ModelShape, choice: Choice, machine: Machine) -> str:
    setup, peak = choice.setup, peak_bytes(shape, choice.setup)
    return (
        f"Written by `longctx init --model`: rows of {setup.tokens:,} tokens on {setup.world} x {machine.name}.\n"
        f"Predicted: {peak / GIB:,.1f} GiB of {machine.usable / GIB:,.1f} per rank, {choice.tokens_per_second:,.0f} "
        "tokens/s (`longctx plan` shows more).\n"
        "Only what differs from the defaults is set; `longctx explain FILE` shows every key."
    )

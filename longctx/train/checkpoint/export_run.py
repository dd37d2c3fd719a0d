"""`longctx export`: export the model from a run's checkpoint, in one process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from longctx.config.load import load
from longctx.config.machine import token_folder
from longctx.config.schema import RunConfig
from longctx.config.stages import model_of, stage_at
from longctx.data.build import RECORD
from longctx.data.tokenizers.tokenizer import load_tokenizer
from longctx.errors import CheckpointError, ConfigError
from longctx.models.load.pretrained import make_model
from longctx.train.checkpoint import manifest, store
from longctx.train.checkpoint.card import model_card
from longctx.train.checkpoint.export import FOLDER, Weights, read_source, write_card, write_lora, write_model
from longctx.train.checkpoint.manifest import Manifest
from longctx.train.checkpoint.safe_load import safe_load
from longctx.train.model import model_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_run(run: Path, output: Path | None = None, step: int | None = None, dtype: str | None = None) -> Path:
    """Write the model of a checkpoint as a folder that plain transformers loads, and return it.

    Args:
        run: a run directory. Nothing in it is changed, except ``run/model`` if ``output`` is None.
        output: the folder to write; it must not exist yet. None replaces ``run/model``.
        step: of the checkpoint; None takes the newest valid one.
        dtype: "fp32", "bf16" or "fp16"; None for that of the pretrained folder, else of training.

    Raises:
        ConfigError: ``run`` is not a run directory, the dtype is unknown, or ``output`` exists.
        CheckpointError: no checkpoint of that step, no valid one, or one whose optimizer state is on NVMe.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"export --dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if output is not None and output.exists():
        raise ConfigError(f"export --output {output}: exists already and is left alone; give another folder")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"export {run}: no config.yaml there; give the output.folder of a run")
    folder, found = _checkpoint(run / "checkpoints", step)
    config = load(run / "config.yaml", default_world=found.world["size"])
    tokenizer = _tokenizer(config, run)
    loaded = load_tokenizer(tokenizer)
    model = model_of(config, stage_at(config, max(found.step, 1)))
    description = model_config(model, loaded.vocabulary_size, loaded.end_of_document, loaded.beginning)
    weights = _weights(folder, found)
    trained = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    weights = {name: x.to(trained) if x.is_floating_point() else x for name, x in weights.items()}
    target = output or run / FOLDER
    source, kind = read_source(config.model.pretrained), DTYPES.get(dtype or "")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if config.model.lora is not None:
            assert source is not None
            write_lora(config, description, weights, tokenizer, target, source, kind)
        else:
            with torch.device("meta"):
                module = make_model(description)
            write_model(module, weights, tokenizer, target, source, kind)
        write_card(target, model_card(config, description, found.progress))
    except OSError as error:
        shutil.rmtree(target.with_name(f".{target.name}.tmp"), ignore_errors=True)
        raise CheckpointError(f"{target} cannot be written: {error.strerror}; give another --output") from None
    return target


def _checkpoint(root: Path, step: int | None) -> tuple[Path, Manifest]:
    """Return the folder and manifest of the newest checkpoint whose files all match their hashes."""
    folders = [path for path in store.published(root) if step is None or path.name == store.name_of(step)]
    reasons = []
    for folder in folders:
        try:
            found = store.read(folder)
            manifest.verify_files(folder, found)
            return folder, found
        except CheckpointError as error:
            reasons.append(str(error))
    if reasons:
        raise CheckpointError(f"export: no checkpoint in {root} is valid: " + "; ".join(reasons))
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    there = ", ".join(path.name for path in store.published(root)) or "nothing"
    raise CheckpointError(f"export: {wanted} in {root}, which holds {there}; give a run that has saved one")


def _tokenizer(config: RunConfig, run: Path) -> Path:
    """Return the folder of a run's tokenizer, which is next to its token files."""
    built = [Path(source) for source in config.data.sources if (Path(source) / RECORD).is_file()]
    folders = [folder / "tokenizer" for folder in (*built[:1], token_folder(config), run / "tokens")]
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return folder
    raise ConfigError(
        f"export {run}: no tokenizer in {folders[0]}; restore the run's token files, or build them again with `longctx "
        f"data build {run / 'config.yaml'}`"
    )


def _weights(folder: Path, found: Manifest) -> Weights:
    """Return the full state dict of a checkpoint, in fp32 where the optimizer keeps fp32 weights."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no GPU is needed: files are only read and merged
    from longctx.engine.zero import nvme, universal

    if any(entry.path.startswith(nvme.PREFIX) for entry in found.files):
        raise CheckpointError(
            f"{folder}: its weights are in NVMe files, which only the run itself can read; let the run finish, or "
            "resume it with train.steps set to its last step + 1"
        )
    if found.zero_stage == 0:
        content = safe_load(folder / "mp_rank_00_model_states.pt", "cpu")
        weights: Weights = content["module"]
        return weights
    try:
        return universal.whole_weights(folder, safe_load)
    except (OSError, RuntimeError, AssertionError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: DeepSpeed cannot merge its weights: {error}") from None

"""At the end of a run: the weights of all ranks together, as a folder that plain transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from longctx.train.agree import ranks, together

FOLDER = "model"


def export_model(engine: Any, tokenizer: Path, output: Path) -> Path:
    """Write ``output/model`` (config.json, model.safetensors, tokenizer files) and return it. All ranks call it.

    The folder is written aside and renamed, so an older export is replaced by a whole one.

    Raises:
        LongctxError: on every rank, if rank 0 could not write.
    """
    weights = gather_weights(engine)
    target = output / FOLDER
    with together():
        if ranks()[0] == 0:
            assert weights is not None
            aside = output / f".{FOLDER}.tmp"
            shutil.rmtree(aside, ignore_errors=True)
            engine.module.save_pretrained(aside, state_dict=weights)
            for file in sorted(tokenizer.iterdir()):
                shutil.copyfile(file, aside / file.name)
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
    return target


def gather_weights(engine: Any) -> dict[str, torch.Tensor] | None:
    """Return the whole model's state dict on rank 0 (CPU tensors) and None elsewhere, on every ZeRO stage."""
    if engine.zero_optimization_stage() == 3:
        # gathers one module at a time, so no rank but 0 ever holds more than one
        gathered: dict[str, torch.Tensor] | None = engine._zero3_consolidated_16bit_state_dict()
    else:
        gathered = engine.module.state_dict()
    if ranks()[0] != 0 or gathered is None:
        return None
    return {name: value.detach().cpu().contiguous() for name, value in gathered.items()}

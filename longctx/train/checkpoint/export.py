"""At the end of a run: the weights of all ranks together, as a folder that plain transformers loads.

The folder differs from the pretrained one that the run began with in its weights alone: config.json,
generation_config.json and the tokenizer's files are copied, and the weights have the dtype that they had there.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longctx.collectives import ranks, together
from longctx.data.tokenizers import folder as tokenizer_folder
from longctx.data.tokens.writer import file_mode
from longctx.models.load.pretrained import read_config, stored_dtype

FOLDER = "model"
GENERATION = "generation_config.json"
Weights = dict[str, torch.Tensor]
_SET_BY_SAVING = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""keys of a config that transformers writes in its own way, whatever the config said"""


@dataclass(frozen=True)
class PretrainedFiles:
    """The files of a pretrained folder that an export repeats.

    Attributes:
        config: content of its config.json; ``text`` is the file's own text.
        read: what ``read_config`` makes of it, as a dictionary.
        generation: bytes of its generation_config.json, or None.
        dtype: of its weights.
    """

    text: str
    read: dict[str, Any]
    generation: bytes | None
    dtype: torch.dtype


def read_source(folder: str | Path | None) -> PretrainedFiles | None:
    """Return what an export repeats of a pretrained folder; None for a model from scratch.

    Raises:
        ModelError: the folder cannot be read as a transformers model.
    """
    if folder is None:
        return None
    folder = Path(folder)
    config = read_config(folder)
    text = (folder / tokenizer_folder.CONFIG).read_text(encoding="utf-8")
    generation = folder / GENERATION
    stored = generation.read_bytes() if generation.is_file() else None
    return PretrainedFiles(text, config.to_dict(), stored, stored_dtype(folder, config))


def export_model(engine: Any, tokenizer: Path, output: Path, source: PretrainedFiles | None = None) -> Path:
    """Write ``output/model`` (config.json, model.safetensors, tokenizer files) and return it. All ranks call it.

    The folder is written aside and renamed, so an older export is replaced by a whole one.

    Args:
        tokenizer: folder of the run's tokenizer.
        source: of a run that began with a pretrained folder; see ``read_source``.

    Raises:
        LongctxError: on every rank, if rank 0 could not write.
    """
    weights = gather_weights(engine)
    target = output / FOLDER
    with together():
        if ranks()[0] == 0:
            assert weights is not None
            write_model(engine.module, weights, tokenizer, target, source)
    return target


def write_model(
    module: Any,
    weights: Weights,
    tokenizer: Path,
    target: Path,
    source: PretrainedFiles | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the folder ``target`` from a model's whole state dict. For one process.

    Args:
        module: a transformers model; its own weights are not read.
        dtype: of the weights; None for the source's, or what they have if there is no source.
    """
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    weights = _shared(module, _cast(weights, dtype or (source.dtype if source else None)))
    found = next(x.dtype for x in weights.values() if x.is_floating_point())
    _save(module, weights, aside)
    _write_config(module.config, found, aside, source)
    if source is None:
        (aside / GENERATION).write_text(module.generation_config.to_json_string(), encoding="utf-8")
    elif source.generation is not None:
        (aside / GENERATION).write_bytes(source.generation)
    tokenizer_folder.copy(tokenizer, aside)
    mode = file_mode()
    for path in aside.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors makes files that nobody else may read
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def gather_weights(engine: Any) -> Weights | None:
    """Return the whole model's state dict on rank 0 (CPU tensors) and None elsewhere, on every ZeRO stage."""
    if engine.zero_optimization_stage() == 3:
        # gathers one module at a time, so no rank but 0 ever holds more than one
        gathered: Weights | None = engine._zero3_consolidated_16bit_state_dict()
    else:
        gathered = engine.module.state_dict()
    if ranks()[0] != 0 or gathered is None:
        return None
    return {name: value.detach().cpu().contiguous() for name, value in gathered.items()}


def _cast(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """Return weights in ``dtype``; as they are where that is None or would make a finite one infinite."""
    if dtype is None:
        return weights
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in weights.items()}
    lost = any(bool((cast[name].isinf() & ~x.isinf()).any()) for name, x in weights.items() if x.is_floating_point())
    return weights if lost else cast


def _shared(module: Any, weights: Weights) -> Weights:
    """Return weights in which all names of one parameter (tied heads) hold one tensor, so that it is saved once."""
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
        if name in weights and first[id(parameter)] in weights:
            weights[name] = weights[first[id(parameter)]]
    return weights


def _save(module: Any, weights: Weights, folder: Path) -> None:
    """Have transformers write config and weights (the dict is emptied); it would refuse some generation configs."""
    own, dtype = module.generation_config, module.config.dtype
    module.generation_config = type(own)()
    try:
        module.save_pretrained(folder, state_dict=weights)
    finally:
        module.generation_config, module.config.dtype = own, dtype
    (folder / GENERATION).unlink(missing_ok=True)


def _write_config(config: Any, dtype: torch.dtype, folder: Path, source: PretrainedFiles | None) -> None:
    """Write config.json: the source's own text where training changed nothing in it but the dtype."""
    name = str(dtype).removeprefix("torch.")
    path = folder / tokenizer_folder.CONFIG
    if source is not None and _essential(source.read) == _essential(config.to_dict()):
        if source.dtype == dtype:
            path.write_text(source.text, encoding="utf-8")
            return
        content = json.loads(source.text)
        content["torch_dtype" if "torch_dtype" in content else "dtype"] = name
    else:
        content = json.loads(path.read_text(encoding="utf-8")) | {"dtype": name}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _essential(config: Any) -> Any:
    """Return a config's dictionary without what saving sets, at any depth."""
    if isinstance(config, dict):
        return {key: _essential(value) for key, value in config.items() if key not in _SET_BY_SAVING}
    if isinstance(config, list | tuple):
        return [_essential(value) for value in config]
    return config

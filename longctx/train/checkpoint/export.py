"""Export a model, gathered from all ranks, as a folder that plain transformers loads.

If the run started from a pretrained folder, the export differs from it only in the weights: config.json,
generation_config.json and the tokenizer's files are copied, and the weights keep their dtype.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longctx.collectives import ranks, together
from longctx.config.schema import RunConfig
from longctx.data.tokenizers import folder as tokenizer_folder
from longctx.data.tokens.writer import file_mode
from longctx.engine.save import gather_weights as gather_adapters
from longctx.models.hook.wrapped import inner_model
from longctx.models.load.pretrained import load_pretrained, make_model, read_config, stored_dtype
from longctx.models.lora import merged, save_adapter
from longctx.train.model import adapted

FOLDER = "model"
GENERATION = "generation_config.json"
CARD = "README.md"
Weights = dict[str, torch.Tensor]
_SET_BY_SAVING = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""config keys that transformers overwrites when it saves"""


@dataclass(frozen=True)
class PretrainedFiles:
    """What an export copies from a pretrained folder.

    Attributes:
        text: its config.json.
        read: its config as ``read_config`` parses it, as a dictionary.
        generation: its generation_config.json, or None.
        dtype: of its weights.
    """

    text: str
    read: dict[str, Any]
    generation: bytes | None
    dtype: torch.dtype


def read_source(folder: str | Path | None) -> PretrainedFiles | None:
    """Return what an export copies from a pretrained folder; None for a model from scratch.

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


def export_model(
    engine: Any,
    tokenizer: Path,
    output: Path,
    source: PretrainedFiles | None = None,
    config: RunConfig | None = None,
    card: str | None = None,
) -> Path:
    """Write ``output/model`` (config.json, model.safetensors, tokenizer files) and return it. All ranks call it.

    The folder is written under a temporary name and renamed, so an older export is replaced only by a complete one.

    Args:
        tokenizer: folder of the run's tokenizer.
        source: returned by ``read_source``; None for a model from scratch.
        config: of a run with `model.lora`, as `model.lora.export` says.
        card: text of README.md, which is written unless an earlier export has one.

    Raises:
        LongctxError: on every rank, if rank 0 could not write.
    """
    lora = config is not None and config.model.lora is not None
    weights = gather_adapters(engine, adapters_only=True) if lora else gather_weights(engine)
    target = output / FOLDER
    with together():
        if ranks()[0] == 0:
            assert weights is not None
            if lora:
                assert config is not None and source is not None
                write_lora(config, inner_model(engine.module).config, weights, tokenizer, target, source)
            else:
                write_model(engine.module, weights, tokenizer, target, source)
            if card is not None:
                write_card(target, card)
    return target


def write_lora(
    config: RunConfig,
    description: Any,
    weights: Weights,
    tokenizer: Path,
    target: Path,
    source: PretrainedFiles,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the folder ``target`` of a run with `model.lora`: the merged model, or the adapter. For one process.

    Args:
        description: the transformers config of the model inside.
        weights: the trained ones, by their names in the PeftModel.
        dtype: of the exported weights; None for the folder's.
    """
    lora, folder = config.model.lora, config.model.pretrained
    assert lora is not None and folder is not None
    if lora.export == "adapter":
        with torch.device("meta"):
            model = adapted(make_model(description), config)
        with _written(target, tokenizer) as aside:
            save_adapter(model, _cast(weights, dtype or source.dtype), aside)
        return
    whole = load_pretrained(folder, dtype=torch.float32, config=copy.deepcopy(description))
    inner = merged(adapted(whole, config), weights)
    write_model(inner, dict(inner.state_dict()), tokenizer, target, source, dtype)


def write_model(
    module: Any,
    weights: Weights,
    tokenizer: Path,
    target: Path,
    source: PretrainedFiles | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the folder ``target`` from a model's full state dict. For one process.

    Args:
        module: a transformers model; its own weights are not read.
        dtype: of the exported weights; None for the source's, or without a source the weights' own.
    """
    weights = _shared(module, _cast(weights, dtype or (source.dtype if source else None)))
    found = next(x.dtype for x in weights.values() if x.is_floating_point())
    with _written(target, tokenizer) as aside:
        _save(module, weights, aside)
        _write_config(module.config, found, aside, source)
        if source is None:
            (aside / GENERATION).write_text(module.generation_config.to_json_string(), encoding="utf-8")
        elif source.generation is not None:
            (aside / GENERATION).write_bytes(source.generation)


@contextmanager
def _written(target: Path, tokenizer: Path) -> Iterator[Path]:
    """Yield a folder beside ``target`` that takes its place, with the tokenizer's files, when the block has ended."""
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    tokenizer_folder.copy(tokenizer, aside)
    if (target / CARD).is_file():  # of an earlier export; its owner may have written it
        shutil.copyfile(target / CARD, aside / CARD)
    mode = file_mode()
    for path in aside.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors creates files with mode 0600, whatever the umask
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def write_card(folder: Path, text: str) -> None:
    """Write a model card into an exported folder, unless it has one."""
    path = folder / CARD
    if not path.exists():
        path.write_text(text, encoding="utf-8")


def gather_weights(engine: Any) -> Weights | None:
    """Return the full state dict on rank 0 (CPU tensors) and None on other ranks, for every ZeRO stage."""
    if engine.zero_optimization_stage() == 3:
        # gathers one module at a time: ranks other than 0 never hold more than one gathered module
        gathered: Weights | None = engine._zero3_consolidated_16bit_state_dict()
    else:
        gathered = engine.module.state_dict()
    if ranks()[0] != 0 or gathered is None:
        return None
    return {name: value.detach().cpu().contiguous() for name, value in gathered.items()}


def _cast(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """Return the weights in ``dtype``; unchanged if it is None or the cast would overflow any finite value."""
    if dtype is None:
        return weights
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in weights.items()}
    lost = any(bool((cast[name].isinf() & ~x.isinf()).any()) for name, x in weights.items() if x.is_floating_point())
    return weights if lost else cast


def _shared(module: Any, weights: Weights) -> Weights:
    """Return the weights with one tensor for all names of a tied parameter, so that it is saved once."""
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
        if name in weights and first[id(parameter)] in weights:
            weights[name] = weights[first[id(parameter)]]
    return weights


def _save(module: Any, weights: Weights, folder: Path) -> None:
    """Write config and weights with transformers (which empties the dict), without its generation config.

    transformers refuses to save some generation configs that it loads; ``write_model`` copies the file instead.
    """
    own, dtype = module.generation_config, module.config.dtype
    module.generation_config = type(own)()
    try:
        module.save_pretrained(folder, state_dict=weights)
    finally:
        module.generation_config, module.config.dtype = own, dtype
    (folder / GENERATION).unlink(missing_ok=True)


def _write_config(config: Any, dtype: torch.dtype, folder: Path, source: PretrainedFiles | None) -> None:
    """Write config.json: the source's text, unless training changed more than the dtype."""
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
    """Return a config's dictionary without the keys in ``_SET_BY_SAVING``, at any depth."""
    if isinstance(config, dict):
        return {key: _essential(value) for key, value in config.items() if key not in _SET_BY_SAVING}
    if isinstance(config, list | tuple):
        return [_essential(value) for value in config]
    return config

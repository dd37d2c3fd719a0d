"""Reshard a checkpoint for another number of ranks with DeepSpeed's universal checkpoints, without unpickling.

ZeRO writes one shard of the optimizer's state per rank, which only the same number of ranks can read. DeepSpeed's
converter merges the shards into one file per parameter, from which any number of ranks can load. Converter and reader
use full pickle, which can run code; here every such read goes through the caller's safe reader instead.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from longctx.patched import patched

Reader = Callable[[Any, Any], Any]  # (path, map_location)


def convert(source: Path, target: Path, ranks: int, reader: Reader) -> None:
    """Write the checkpoint folder ``source`` as a universal one that ``ranks`` ranks can read. For one process.

    Raises:
        OSError: the disk is full.
        RuntimeError, AssertionError, KeyError: DeepSpeed cannot convert it, for example if the optimizer is not Adam.
    """
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with _safely(reader), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    first = target / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    for rank in range(
        ranks if first.is_file() else 0
    ):  # ZeRO-3: apart from its shards, every rank's file has the same content
        own = target / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        if not own.exists():
            shutil.copyfile(first, own)


def load(engine: Any, folder: Path, reader: Reader) -> bool:
    """Load a folder that ``convert`` wrote into an engine with any number of ranks. Collective over the world.

    Two errors of DeepSpeed's reader are corrected: it gives every parameter group the settings of the first one, and
    all parameters the same step tensor, which each of their updates would advance.
    """
    settings = [{key: value for key, value in group.items() if key != "params"} for group in _groups(engine)]
    before = engine._config.load_universal_checkpoint
    engine._config.load_universal_checkpoint = True
    try:
        with _safely(reader):
            path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    finally:
        engine._config.load_universal_checkpoint = before
    for group, own in zip(_groups(engine), settings, strict=True):
        group.update(own)
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    return path is not None


def whole_weights(folder: Path, reader: Reader) -> dict[str, torch.Tensor]:
    """Return a model's whole fp32 state dict from a checkpoint folder of ZeRO 1 to 3. For one process.

    Raises:
        RuntimeError, AssertionError, KeyError, ValueError: DeepSpeed cannot read it.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with _safely(reader), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name)
    return found


def _groups(engine: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = engine.optimizer.param_groups
    return found


@contextlib.contextmanager
def _safely(reader: Reader) -> Iterator[None]:
    """Within the block, ``torch.load`` with full pickle calls ``reader`` instead."""
    original = torch.load

    def load(file: Any, map_location: Any = None, **options: Any) -> Any:
        if options.get("weights_only") is True:
            return original(file, map_location=map_location, **options)
        return reader(file, map_location)

    with patched(torch, load=load):
        yield

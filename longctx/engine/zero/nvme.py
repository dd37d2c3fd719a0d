"""Correct DeepSpeed's reads from NVMe, and save swapped optimizer states as plain files.

DeepSpeed 0.19.8 reads a gradient from disk directly into its slice of the sub-group's buffer. Reads bypass the page
cache (O_DIRECT) and need addresses that are multiples of 512 bytes, but a slice's offset is the sum of the sizes before
it and may be any number. Such a read fails silently, and the optimizer steps on the buffer's old content. A write that
is truncated because the disk is full is not reported either.

DeepSpeed's checkpoints copy the swap files but omit what is not swapped: AdamW's step counts, and every sub-group below
1 MiB per rank. Here each rank writes one file per sub-group with its whole state, one sub-group in memory at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from longctx.errors import EngineError
from longctx.patched import patched

PREFIX = "nvme_"


def swaps(engine: Any) -> bool:
    """Return whether the engine's optimizer states are swapped to NVMe."""
    return getattr(engine.optimizer, "optimizer_swapper", None) is not None


def mend_reads(engine: Any) -> None:
    """Make an engine read gradients through aligned buffers, and raise if a swap file is truncated.

    Engines that do not swap are left unchanged.

    Raises (later, in a step):
        EngineError: a swap file is shorter than the data swapped out to it.
    """
    if not swaps(engine):
        return
    swapper = engine.optimizer.optimizer_swapper
    read_states = swapper._swap_in_parameter

    def read_gradients(handle: Any, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        pieces = list(swapper.swap_params_info[swapper.parameter_id(parameter)].swapped_gradients.values())
        # Unpinned memory makes the operator read into an aligned buffer of its own and copy from there.
        parts = [torch.empty(piece.length, dtype=gradient.dtype) for piece in pieces]
        for part, piece in zip(parts, pieces, strict=True):
            _require_whole(piece.path, part.nbytes)
            handle.async_pread(part, piece.path, 0)
        handle.wait()
        for part, piece in zip(parts, pieces, strict=True):
            gradient.narrow(0, piece.offset, piece.length).copy_(part)

    def checked(aio_handle: Any, parameter: torch.Tensor, dest_buffers: list[torch.Tensor]) -> None:
        info = swapper.swap_params_info[swapper.parameter_id(parameter)]
        for path in info.get_swap_paths():
            _require_whole(path, info.numel() * info.dtype().itemsize)
        read_states(aio_handle=aio_handle, parameter=parameter, dest_buffers=dest_buffers)

    swapper._swap_in_pinned_gradients = read_gradients
    swapper._swap_in_parameter = checked


def _require_whole(path: str, size: int) -> None:
    found = os.stat(path).st_size if os.path.exists(path) else 0
    if found < size:
        raise EngineError(
            f"zero.nvme_folder: {path} holds {found:,} of {size:,} bytes that were swapped out; is the disk full?"
        )


@contextlib.contextmanager
def saving(engine: Any) -> Iterator[None]:
    """Within the block, ``save_checkpoint`` writes this rank's optimizer states as plain files, no swap files."""
    if not swaps(engine):
        yield
        return

    def save(folder: str, tag: str) -> None:
        for index, payload in enumerate(_states(engine.optimizer)):
            engine.checkpoint_engine.save(payload, str(Path(folder, tag, _name(engine.global_rank, index))))

    with patched(engine, _save_zero_checkpoint=save, zero_nvme_offload_optimizer=lambda: False):
        yield


@contextlib.contextmanager
def loading(engine: Any, restored: Callable[[], None]) -> Iterator[None]:
    """Within the block, ``load_checkpoint`` calls ``restored`` instead of reading optimizer states.

    At that point parameters are partitioned; those that every rank keeps whole are gathered from them afterwards.
    """
    if not swaps(engine):
        yield
        return

    def load(folder: str, tag: str, **options: Any) -> bool:
        restored()
        return True

    with patched(engine, _load_zero_checkpoint=load, zero_nvme_offload_optimizer=lambda: False):
        yield


def restore(engine: Any, folder: Path, reader: Callable[[str, str], Any]) -> None:
    """Read the states that ``saving`` wrote, and set this rank's weights from them. No communication.

    Raises:
        EngineError: the sub-groups of the files differ from this run's.
    """
    zero = engine.optimizer
    zero.optimizer_swapper.purge_state()
    for index, weights in enumerate(zero.fp32_partitioned_groups_flat):
        payload = reader(str(folder / _name(engine.global_rank, index)), "cpu")
        size = int(zero.fp16_partitioned_groups_flat_numel[index])
        if payload["weights"].numel() != size:
            raise EngineError(
                f"{folder}: sub-group {index} has {payload['weights'].numel():,} numbers, this run's has {size:,}: set "
                "deepspeed.zero_optimization.sub_group_size back"
            )
        swapped = zero._swappable_optimizer_subgroup(index)  # sub-groups below DeepSpeed's minimum stay in memory
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(index)
        weights.data.copy_(payload["weights"])
        zero.optimizer.state[weights] = payload["state"]
        # fp16 parameters are set from the fp32 weights, and the sub-group goes back to NVMe
        zero._reassign_or_swap_out_partitioned_parameters(index)
        if swapped:
            zero._optimizer_states_and_gradient_swap_out(index)


def _states(zero: Any) -> Iterator[dict[str, Any]]:
    """Yield every sub-group's fp32 weights and optimizer state, copied from where they are."""
    for index, weights in enumerate(zero.fp32_partitioned_groups_flat):
        swapped = zero._swappable_optimizer_subgroup(index)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(index)
        state = {key: _copy(value) for key, value in zero.optimizer.state.get(weights, {}).items()}
        yield {"weights": _copy(weights), "state": state}
        if swapped:
            zero._release_swap_buffers(index)


def _copy(value: Any) -> Any:
    """Copy a tensor to the host, without the rest of the buffer that it is a view of; return other values unchanged."""
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value


def _name(rank: int, index: int) -> str:
    return f"{PREFIX}rank_{rank:05d}_group_{index:05d}.pt"

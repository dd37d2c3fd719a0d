"""exchange: a few integers from every rank, at a place in the loop that all ranks must have reached.

A rank that skips a step, evaluates once more or saves alone would pair its message with another one's of the other
ranks: garbage, or a hang until torch's limit of half an hour. So each message says where its sender is, ranks at
different places raise alike, and a rank that does not come within ``mesh.patience`` seconds is named.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from longctx.errors import EngineError, LongctxError
from longctx.mesh import Mesh
from longctx.sameness import ranks_text

logger = logging.getLogger(__name__)

PLACES = (  # append only at the end: ranks compare the index
    "start-up",
    "engine.shard",
    "engine.weigh",
    "engine.evaluate",
    "the check of the model's loss",
    "engine.save_checkpoint",
    "engine.load_checkpoint",
    "engine.save_16bit_model",
    "engine.save_pretrained",
)
_WIDTH = 8  # integers in a message; one size for all, so that no two messages fail on their lengths
_FIRST_WORD = 60.0  # seconds of waiting after which missing ranks are named in the log
_LOOKUP = 10.0  # seconds that the store may take to say who is missing
_BROKEN = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL", "c10d")
_groups: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def exchange(numbers: list[int], mesh: Mesh, at: str = "start-up", step: int = 0) -> list[list[int]]:
    """Return every rank's ``numbers`` (the same count on each), in rank order. Collective over the world.

    Args:
        numbers: at most six integers.
        at: one of ``PLACES``, the call that this rank is in.
        step: optimizer steps that this rank has made.

    Raises:
        EngineError: on every rank, when ranks are at different places or steps; on the ranks that wait, when one does
            not come within ``mesh.patience`` seconds.
    """
    if mesh.world_size == 1:
        return [numbers]
    if dist.get_backend() == "fake":  # a rehearsal: one rank of a world that is not there
        return [numbers] * mesh.world_size
    group = control_group(mesh)
    padding = [0] * (_WIDTH - 2 - len(numbers))
    mine = torch.tensor([PLACES.index(at), step, *numbers, *padding], dtype=torch.int64, device=_device(group, mesh))
    everyone = [torch.empty_like(mine) for _ in range(mesh.world_size)]
    _note(f"{at} after {step} steps", mesh)
    work = dist.all_gather(everyone, mine, group=group, async_op=True)
    _wait(work, mesh, f"{at} after {step} steps")
    rows = torch.stack(everyone).tolist()
    _check_places([(PLACES[row[0]], row[1]) for row in rows])
    return [row[2 : 2 + len(numbers)] for row in rows]


@contextmanager
def reached(here: str, mesh: Mesh) -> Iterator[None]:
    """Run a block that sends messages of its own; if a message fails, name the ranks that are elsewhere.

    Raises:
        EngineError: on this rank, when a connection broke or torch's own limit passed.
    """
    if mesh.world_size == 1 or dist.get_backend() == "fake":
        yield
        return
    _note(here, mesh)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LongctxError) or not any(word in str(error) for word in _BROKEN):
            raise
        raise EngineError(
            f"{here}: a message between ranks failed. {_missing(mesh, here)} A rank ended, hangs, or skipped a call "
            f"that all must make. torch says: {_first_line(error)}"
        ) from error


def control_group(mesh: Mesh) -> dist.ProcessGroup:
    """Return the group that carries exchanges; collective over the world on first use.

    Over gloo it has connections of its own, so that an exchange never meets a message of DeepSpeed's.
    """
    world = dist.group.WORLD
    assert world is not None
    if dist.get_backend() != "gloo":
        return world
    if "control" not in _groups or _groups["control"][0] is not world:
        group = dist.new_group(backend="gloo")
        assert group is not None
        _groups["control"] = (world, group)
    return _groups["control"][1]


def _device(group: dist.ProcessGroup, mesh: Mesh) -> torch.device:
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else mesh.device


def _check_places(places: list[tuple[str, int]]) -> None:
    """Raise on all ranks alike unless all of them are at one place of one step."""
    holders: dict[tuple[str, int], list[int]] = {}
    for rank, place in enumerate(places):
        holders.setdefault(place, []).append(rank)
    if len(holders) > 1:
        found = "; ".join(f"{ranks_text(r)} in {at} after {step} steps" for (at, step), r in holders.items())
        raise EngineError(
            f"the ranks are at different places of the loop: {found}. Every rank must take the same number of windows, "
            "steps and evaluations, and all must call save_checkpoint: look for a loop that ends or continues early on "
            "some ranks (loaders of different lengths, `if rank == 0`)"
        )


def _wait(work: Any, mesh: Mesh, here: str) -> None:
    """Wait for all ranks; say after a minute which are missing, and give up after ``mesh.patience`` seconds."""
    started = time.monotonic()
    first = min(_FIRST_WORD, mesh.patience)
    try:
        if dist.get_backend() == "gloo" and first < mesh.patience:
            try:
                work.wait(timedelta(seconds=first))
                return
            except RuntimeError:
                if work.is_completed():
                    raise  # not a matter of time: a connection is gone
                logger.warning("%s: waiting since %.0f s. %s", here, first, _missing(mesh, here))
        work.wait(timedelta(seconds=max(mesh.patience - (time.monotonic() - started), 1.0)))
    except RuntimeError as error:
        waited = time.monotonic() - started
        raise EngineError(
            f"{here}: waited {waited:.0f} s for all ranks (Mesh(patience={mesh.patience:g})). {_missing(mesh, here)} "
            f"A rank ended, hangs, or skipped a call that all must make. torch says: {_first_line(error)}"
        ) from error


def _note(here: str, mesh: Mesh) -> None:
    """Leave word in the job's store where this rank is; the others read it only when it is missed.

    A store that is a file takes no word while its disk is full; what the word is about goes on without it.
    """
    store = dist.distributed_c10d._get_default_store()
    with suppress(RuntimeError):
        store.set(f"longctx/rank/{mesh.rank}", here)


def _missing(mesh: Mesh, here: str) -> str:
    """Return a sentence with the ranks that are not ``here``, and where each was seen last."""
    seen: dict[int, str] = {}

    def look() -> None:
        store = dist.distributed_c10d._get_default_store()
        for rank in range(mesh.world_size):
            key = f"longctx/rank/{rank}"
            seen[rank] = store.get(key).decode() if store.check([key]) else "start"

    reader = threading.Thread(target=look, daemon=True)  # the store's own host may be the rank that hangs
    reader.start()
    reader.join(_LOOKUP)
    if len(seen) < mesh.world_size:
        return "The store of the job (in the first rank, or the launcher) does not answer."
    absent = [(rank, place) for rank, place in seen.items() if place != here]
    if not absent:
        return "All ranks were here last, so one of them ended or stands still here."
    return "Not here: " + "; ".join(f"rank {rank}, last seen in {place}" for rank, place in absent[:8]) + "."


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

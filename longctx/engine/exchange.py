"""Gather a few integers from every rank, and verify that all ranks are at the same call of the training loop.

If one rank skips a step, evaluates once more or saves alone, its collective would match a different one of the other
ranks: wrong data, or a hang until torch's timeout of half an hour. So each message contains its sender's call site in
the loop. All ranks raise if these differ, and a rank that does not arrive within ``mesh.patience`` seconds is named.
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

CALL_SITES = (  # append only at the end: ranks compare the index
    "start-up",
    "engine.shard",
    "engine.weigh",
    "engine.evaluate",
    "the check of the model's loss",
    "engine.save_checkpoint",
    "engine.load_checkpoint",
    "engine.save_16bit_model",
    "engine.save_pretrained",
    "longctx.windows",
    "longctx.hf",
)
_WIDTH = 8  # integers per message; a fixed size, so that messages of different call sites still match
_FIRST_WORD = 60.0  # seconds until missing ranks are named in the log
_LOOKUP = 10.0  # seconds to wait for the store when looking up missing ranks
_BROKEN = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL", "c10d")
_groups: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def exchange(numbers: list[int], mesh: Mesh, at: str = "start-up", step: int = 0) -> list[list[int]]:
    """Return every rank's ``numbers``, of equal length, in rank order. Collective over the world.

    Args:
        numbers: at most six integers.
        at: the call that this rank is in, one of ``CALL_SITES``.
        step: optimizer steps that this rank has taken.

    Raises:
        EngineError: on every rank, if call sites or steps differ; on the waiting ranks, if one does not arrive within
            ``mesh.patience`` seconds.
    """
    if mesh.world_size == 1:
        return [numbers]
    if dist.get_backend() == "fake":  # a rehearsal: the other ranks do not exist
        return [numbers] * mesh.world_size
    group = control_group(mesh)
    padding = [0] * (_WIDTH - 2 - len(numbers))
    mine = torch.tensor(
        [CALL_SITES.index(at), step, *numbers, *padding], dtype=torch.int64, device=_device(group, mesh)
    )
    everyone = [torch.empty_like(mine) for _ in range(mesh.world_size)]
    _note(f"{at} after {step} steps", mesh)
    work = dist.all_gather(everyone, mine, group=group, async_op=True)
    _wait(work, mesh, f"{at} after {step} steps")
    rows = torch.stack(everyone).tolist()
    _check_call_sites([(CALL_SITES[row[0]], row[1]) for row in rows])
    return [row[2 : 2 + len(numbers)] for row in rows]


@contextmanager
def reached(here: str, mesh: Mesh) -> Iterator[None]:
    """Run a block with collectives of its own; if one fails, raise an error that names the ranks elsewhere.

    Raises:
        EngineError: on this rank, if a connection broke or torch's own timeout passed.
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
    """Return the process group for exchanges. Collective over the world on first use.

    With gloo it is a separate group, so that an exchange never matches one of DeepSpeed's collectives.
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


def _check_call_sites(sites: list[tuple[str, int]]) -> None:
    """Raise on every rank unless all ranks are in the same call of the same step."""
    holders: dict[tuple[str, int], list[int]] = {}
    for rank, site in enumerate(sites):
        holders.setdefault(site, []).append(rank)
    if len(holders) > 1:
        found = "; ".join(f"{ranks_text(r)} in {at} after {step} steps" for (at, step), r in holders.items())
        raise EngineError(
            f"the ranks are at different places of the loop: {found}. Every rank must take the same number of windows, "
            "steps and evaluations, and all must call save_checkpoint: look for a loop that ends or continues early on "
            "some ranks (loaders of different lengths, `if rank == 0`)"
        )


def _wait(work: Any, mesh: Mesh, here: str) -> None:
    """Wait for all ranks; log the missing ones after a minute, and raise after ``mesh.patience`` seconds."""
    started = time.monotonic()
    first = min(_FIRST_WORD, mesh.patience)
    try:
        if dist.get_backend() == "gloo" and first < mesh.patience:
            try:
                work.wait(timedelta(seconds=first))
                return
            except RuntimeError:
                if work.is_completed():
                    raise  # no timeout: a connection broke
                logger.warning("%s: waiting since %.0f s. %s", here, first, _missing(mesh, here))
        work.wait(timedelta(seconds=max(mesh.patience - (time.monotonic() - started), 1.0)))
    except RuntimeError as error:
        waited = time.monotonic() - started
        raise EngineError(
            f"{here}: waited {waited:.0f} s for all ranks (Mesh(patience={mesh.patience:g})). {_missing(mesh, here)} "
            f"A rank ended, hangs, or skipped a call that all must make. torch says: {_first_line(error)}"
        ) from error


def _note(here: str, mesh: Mesh) -> None:
    """Write where this rank is into the job's store, where other ranks look it up if this one is missing.

    A failed write (a file store on a full disk) is ignored.
    """
    store = dist.distributed_c10d._get_default_store()
    with suppress(RuntimeError):
        store.set(f"longctx/rank/{mesh.rank}", here)


def _missing(mesh: Mesh, here: str) -> str:
    """Return a sentence that lists the ranks that are not ``here``, and where each was seen last."""
    seen: dict[int, str] = {}

    def look() -> None:
        store = dist.distributed_c10d._get_default_store()
        for rank in range(mesh.world_size):
            key = f"longctx/rank/{rank}"
            seen[rank] = store.get(key).decode() if store.check([key]) else "start"

    # A thread, because the rank that hosts the store may be the one that hangs.
    reader = threading.Thread(target=look, daemon=True)
    reader.start()
    reader.join(_LOOKUP)
    if len(seen) < mesh.world_size:
        return "The store of the job (in the first rank, or the launcher) does not answer."
    absent = [(rank, site) for rank, site in seen.items() if site != here]
    if not absent:
        return "All ranks were here last, so one of them ended or hangs here."
    return "Not here: " + "; ".join(f"rank {rank}, last seen in {site}" for rank, site in absent[:8]) + "."


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

"""The folder on NVMe that one run swaps to: checked on every host before anything heavy, empty at the start, gone at
the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from longctx.collectives import ranks, together
from longctx.config import nvme
from longctx.config.schema import RunConfig
from longctx.config.topology import ranks_per_host
from longctx.errors import ConfigError


@contextmanager
def swap_folder(config: RunConfig) -> Iterator[None]:
    """Hold the run's swap folder. All ranks enter it together, holding the output folder; without NVMe it does nothing.

    Raises:
        ConfigError: on every rank, if a host has no such folder, no room in it, no libaio or no direct writes.
    """
    if config.zero.offload_optimizer != "nvme":
        yield
        return
    rank, world = ranks()
    folder = nvme.run_folder(config)
    first = int(os.environ.get("LOCAL_RANK", rank)) == 0  # one of each host
    here = ranks_per_host(config, world) or world
    with together():
        if first:
            shutil.rmtree(folder, ignore_errors=True)  # what a killed run of this output folder left
    with together():
        if first:
            for key, message in nvme.missing(config, here / world):
                raise ConfigError(f"{key}: {message}")
            try:
                folder.mkdir(exist_ok=True)
                direct = nvme.writes_directly(folder)
            except OSError as error:
                raise ConfigError(f"{nvme.KEY}: {str(folder)!r} cannot be written to ({error.strerror})") from None
            if not direct:
                raise ConfigError(f"{nvme.KEY}: {str(folder)!r} is on a file system without O_DIRECT; give another")
    try:
        yield
    finally:
        shutil.rmtree(folder / "zero_stage_3" / "optimizer" / f"rank{rank}", ignore_errors=True)
        for path in (folder / "zero_stage_3" / "optimizer", folder / "zero_stage_3", folder):
            try:
                path.rmdir()  # the last rank of a host
            except OSError:
                break

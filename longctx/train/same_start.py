"""Compare configuration, code and packages of all ranks once, before anything is built, under every launcher.

Under torchrun, mpirun or srun each rank reads the YAML itself, and a different learning rate, seed or layout on one
rank would give finite losses and wrong weights. An error that one rank finds in its YAML stops the others here too.
"""

from __future__ import annotations

from typing import Any

from longctx import rendezvous
from longctx.config.schema import RunConfig
from longctx.mesh import Mesh
from longctx.sameness import code_and_packages, compare_ranks, flatten

# These may differ between hosts: how ranks were started, and paths of folders with the same contents.
OF_THE_HOST = ("launch", "model.pretrained", "zero.nvme_folder")


def compare_start(config: RunConfig | None, problem: Exception | None = None) -> None:
    """Initialize torch.distributed if necessary, and compare configuration, code and packages of all ranks.

    Args:
        config: this rank's; None if it could not be read.
        problem: why it could not be read.

    Raises:
        EngineError: on every rank; it lists each differing key with the ranks' values.
        Exception: ``problem``, on the rank that passed it.
    """
    world = Mesh()  # ring size 1: only rank and world size are used
    rendezvous.start(world.world_size, world.rank)
    values: dict[str, Any] = {}
    if config is not None:
        settings = flatten(config.model_dump(mode="json"))
        values = {key: value for key, value in settings.items() if not _of_the_host(key)} | code_and_packages()
    compare_ranks(values, problem)


def _of_the_host(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in OF_THE_HOST)

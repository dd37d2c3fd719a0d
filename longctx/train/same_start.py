"""Compare what every rank was given, in one exchange before anything is built, on every way of starting.

Under torchrun, mpirun or srun each rank reads the YAML by itself: another learning rate, seed or layout on one of them
gives finite losses and wrong weights. What one rank alone finds wrong in its YAML stops the others here too.
"""

from __future__ import annotations

from typing import Any

from longctx import rendezvous
from longctx.config.schema import RunConfig
from longctx.mesh import Mesh
from longctx.sameness import code_and_packages, compare_ranks, flatten

# May differ from host to host: how ranks were started, and folders of this host with the same content everywhere.
OF_THE_HOST = ("launch", "model.pretrained", "zero.nvme_folder")


def compare_start(config: RunConfig | None, problem: Exception | None = None) -> None:
    """Start torch.distributed if nothing has, and compare configuration, code and packages over all ranks.

    Args:
        config: of this rank; None where it could not be read.
        problem: why it could not.

    Raises:
        EngineError: on every rank, with each key that differs and who has which value.
        Exception: ``problem``, on the rank that passed it.
    """
    world = Mesh()  # a grid without a ring: only to know the ranks
    rendezvous.start(world.world_size, world.rank)
    values: dict[str, Any] = {}
    if config is not None:
        settings = flatten(config.model_dump(mode="json"))
        values = {key: value for key, value in settings.items() if not _of_the_host(key)} | code_and_packages()
    compare_ranks(values, problem)


def _of_the_host(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in OF_THE_HOST)

"""World size and rank come from the first launcher whose variables name several ranks."""

from __future__ import annotations

import pytest

from longctx.errors import MeshError
from longctx.mesh import Mesh
from longctx.world import launched_by, launched_world, local_rank


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "1", "RANK": "1"},
        {"RANK": "1"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
    ],
)
def test_a_world_of_one_is_no_launched_job(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_by() is None
    mesh = Mesh()
    assert (mesh.world_size, mesh.rank) == (1, 0)


def test_the_variables_that_were_seen_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")  # of a shell inside torchrun, say; what counts is mpirun's
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert launched_by() == "OMPI_COMM_WORLD_SIZE=4, OMPI_COMM_WORLD_RANK=3"
    assert (Mesh().world_size, Mesh().rank) == (4, 3)
    assert launched_world() == (4, 3)


def test_a_variable_that_is_no_integer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "first")
    with pytest.raises(MeshError, match="PMI_RANK='first': both must be integers"):
        launched_world()


def test_the_local_rank_is_the_launchers_and_0_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert local_rank() == 0
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert local_rank() == 1

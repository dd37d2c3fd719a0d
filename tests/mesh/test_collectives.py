"""Values of all ranks arrive in rank order, and one rank's failure is every rank's."""

from __future__ import annotations

import pytest
import torch

from longctx.collectives import broadcast_json, gather_floats, gather_json, gather_tensors, ranks, together
from longctx.errors import CheckpointError, LongctxError

from distributed import run_ranks


def exchanged(rank: int, world: int) -> None:
    assert ranks() == (rank, world) == (rank, 2)
    assert gather_json({"text": "ä" * rank}) == [{"text": ""}, {"text": "ä"}]
    assert broadcast_json(["from", rank]) == ["from", 0]
    assert gather_floats([rank, 0.5]).tolist() == [[0.0, 0.5], [1.0, 0.5]]
    assert [x.tolist() for x in gather_tensors(torch.tensor([rank, 7]))] == [[0, 7], [1, 7]]


def failed(rank: int, world: int, error: Exception) -> str:
    with pytest.raises(type(error) if rank == 1 else LongctxError) as raised, together():
        if rank == 1:
            raise error
    return f"{type(raised.value).__name__}: {raised.value}"


def test_values_of_two_ranks_are_exchanged() -> None:
    run_ranks(2, exchanged)


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    assert run_ranks(2, failed, CheckpointError("disk full")) == ["CheckpointError: disk full"] * 2
    others, own = run_ranks(2, failed, OSError("gone"))
    assert own == "OSError: gone" and others == "LongctxError: rank 1 failed: OSError: gone"


def test_one_process_exchanges_with_itself() -> None:
    assert ranks() == (0, 1)
    assert gather_json((1, "x")) == [[1, "x"]]  # as JSON would return it
    assert gather_floats([1.5]).tolist() == [[1.5]]
    with pytest.raises(OSError, match="gone"), together():
        raise OSError("gone")

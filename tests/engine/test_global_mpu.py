"""An engine's mpu stays its own: engines made later in the same process train right, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
from engine_tiny import make_optimizer, run_ranks, tiny_llama

from longctx.errors import EngineError

SETTINGS = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}


def plain(**options: Any) -> Any:
    import deepspeed

    model = tiny_llama(num_hidden_layers=1)
    optimizer = make_optimizer("sgd", model.parameters())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=dict(SETTINGS), **options)[0]


def one_after_another(rank: int, world: int) -> Any:
    from deepspeed.utils import groups

    import longctx

    groups.mpu = None  # what a fresh process has
    mesh = longctx.Mesh(ring=2)
    first, *_ = longctx.initialize(
        model=(model := tiny_llama(num_hidden_layers=1)), config=dict(SETTINGS), mesh=mesh,
        optimizer=make_optimizer("sgd", model.parameters()),
    )  # fmt: skip
    after_ours = groups.mpu, plain().sequence_parallel_size

    theirs = plain(mpu=mesh)
    stale = plain()
    with pytest.raises(EngineError) as error:
        longctx.attach(stale, mesh)
    longctx.attach(theirs, mesh)
    return first.sequence_parallel_size, after_ours, str(error.value), (groups.mpu, plain().sequence_parallel_size)


def test_an_mpu_stays_with_its_engine() -> None:
    for ours, after_ours, message, after_theirs in run_ranks(2, one_after_another):
        assert ours == 2
        assert after_ours == after_theirs == (None, 1)
        assert "sequence_parallel_size 2 from an earlier engine" in message

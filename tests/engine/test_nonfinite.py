"""A loss or gradient that is not finite on any rank stops every rank before the update."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engine_tiny import make_engine, ragged_rows, run_ranks, run_window, weights_of

from longctx.errors import NonFiniteError


def broken(rank: int, world: int, stage: int, fault: str, options: dict[str, Any]) -> dict[str, Any]:
    engine = make_engine(2, stage, gas=2, **options)
    run_window(engine, [ragged_rows(0, index, engine.mesh.data_rank) for index in range(2)])
    before, steps = weights_of(engine), engine.global_steps
    window = engine.shard([ragged_rows(1, index, engine.mesh.data_rank) for index in range(2)])
    message = ""
    for index, batch in enumerate(window):
        loss = engine(**batch).loss
        if rank == 2 and index == 0:  # one rank, one micro-batch
            loss = loss * math.nan if fault == "nan" else loss + math.inf  # + inf: the gradients stay finite
        engine.backward(loss)
        if index == 0:
            engine.step()
    try:
        engine.step()
    except NonFiniteError as error:
        message = str(error)
    after = weights_of(engine)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    counted = engine.global_steps - steps
    run_window(engine, [ragged_rows(2, index, engine.mesh.data_rank) for index in range(2)])  # and it can go on
    loss, moved = engine.global_loss, not torch.equal(weights_of(engine)["lm_head.weight"], after["lm_head.weight"])
    engine.destroy()
    return {"message": message, "unchanged": unchanged, "counted": counted, "loss": loss, "moved": moved}


PATHS = [
    (0, {}),
    (1, {}),
    (2, {}),
    (3, {}),
    (0, {"bf16": {"enabled": True}}),
    (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    (2, {"bf16": {"enabled": True, "check_grad_overflow": False}}),
    (3, {"bf16": {"enabled": True}}),
    (1, {"offload": True}),
    (3, {"offload": True}),
]


CELLS = [pytest.param(*path, "nan", marks=pytest.mark.deep if index > 3 else ()) for index, path in enumerate(PATHS)]
CELLS += [pytest.param(*path, "inf", marks=pytest.mark.deep if index else ()) for index, path in enumerate(PATHS)]


@pytest.mark.parametrize(("stage", "options", "fault"), CELLS)
def test_nothing_is_updated_when_a_loss_of_any_rank_is_not_finite(
    stage: int, options: dict[str, Any], fault: str
) -> None:
    for result in run_ranks(4, broken, stage, fault, options):
        assert "not finite" in result["message"]
        assert result["unchanged"] and result["counted"] == 0
        assert math.isfinite(result["loss"]) and result["moved"]

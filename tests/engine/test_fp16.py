"""fp16 with loss scaling trains, on every ZeRO stage, what one process trains in fp16; overflows are skipped together.

DeepSpeed refuses fp16 on a CPU without fp16 instructions. torch has its kernels there all the same, only slower, so
ranks say that the CPU can (``allow_fp16``).
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from engine_tiny import (
    make_engine,
    make_optimizer,
    ragged_rows,
    run_ranks,
    run_window,
    tiny_llama,
    unsharded_loss,
    weights_of,
)

from longctx.engine.zero.fp16 import loss_scale
from longctx.errors import EngineError, NonFiniteError

from tolerances import tolerance

STEPS, SCALE = 6, 2.0**10


def allow_fp16() -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def fp16(**keys: Any) -> dict[str, Any]:
    return {"fp16": {"enabled": True, "initial_scale_power": 10, "hysteresis": 1, **keys}}


@functools.cache
def truth(clip: float) -> dict[str, Any]:
    """The same arithmetic in one process: weights rounded to fp16, losses scaled, masters and SGD's update in fp32."""
    masters = tiny_llama()
    model = tiny_llama().half()
    optimizer = make_optimizer("sgd", masters.parameters())
    losses, norms = [], []
    for step in range(STEPS):
        parts = [unsharded_loss(model, ragged_rows(step, index, replica)) for index in range(2) for replica in range(2)]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        model.zero_grad()
        (loss * SCALE).backward()
        for master, weight in zip(masters.parameters(), model.parameters(), strict=True):
            master.grad = weight.grad.float() / SCALE
        norms.append(float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in masters.parameters()]))))
        if clip:
            torch.nn.utils.clip_grad_norm_(masters.parameters(), clip)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters.parameters(), model.parameters(), strict=True):
                weight.copy_(master)
        losses.append(float(loss.detach()))
    moved = {name: p.detach() - dict(tiny_llama().named_parameters())[name] for name, p in masters.named_parameters()}
    return {"losses": losses, "norms": norms, "moved": {name: change.detach() for name, change in moved.items()}}


def train(rank: int, world: int, stage: int, settings: dict[str, Any]) -> dict[str, Any]:
    allow_fp16()
    engine = make_engine(2, stage, gas=2, **settings)
    losses, norms, scales = [], [], []
    for step in range(STEPS):
        window = engine.shard([ragged_rows(step, index, engine.mesh.data_rank) for index in range(2)])
        for batch in window:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
        losses.append(engine.global_loss)
        norms.append(engine.grad_norm)
        scales.append(loss_scale(engine))
    result = {"losses": losses, "norms": norms, "scales": scales, "weights": weights_of(engine)}
    engine.destroy()
    return result


def compare(results: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    before = {name: p.detach().half().float() for name, p in tiny_llama().named_parameters()}
    for result in results:
        torch.testing.assert_close(result["losses"], wanted["losses"], rtol=tolerance("fp16"), atol=0)
        torch.testing.assert_close(result["norms"], wanted["norms"], rtol=tolerance("fp16 training"), atol=0)
        change, right = (
            torch.cat([part.flatten() for part in parts])
            for parts in (
                [result["weights"][name] - weight for name, weight in before.items()],
                [wanted["moved"][name] for name in before],
            )
        )
        assert (change - right).norm() <= tolerance("fp16 training") * right.norm()


@pytest.mark.parametrize(
    ("clip", "stage"),
    [
        *(pytest.param(0.0, stage, marks=pytest.mark.slow) for stage in range(4)),
        *(pytest.param(0.5, stage, marks=pytest.mark.deep) for stage in (1, 2)),
        (0.5, 0),
        (0.5, 3),
    ],
)
def test_every_stage_trains_as_one_process_in_fp16(stage: int, clip: float) -> None:
    results = run_ranks(4, train, stage, {**fp16(), "gradient_clipping": clip})
    compare(results, truth(clip))
    assert all(result["scales"] == [SCALE] * STEPS for result in results)


@pytest.mark.parametrize(("stage", "zero"), [(2, {"offload_optimizer": {"device": "cpu"}}), (0, {})], ids=["cpu", "0"])
def test_offloaded_and_with_a_static_scale(stage: int, zero: dict[str, Any]) -> None:
    settings = {**fp16(loss_scale=SCALE), "zero": zero}
    compare(run_ranks(4, train, stage, settings), truth(0.0))


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.deep)])
def test_a_scale_that_grows_every_other_step_changes_no_update(stage: int) -> None:
    results = run_ranks(4, train, stage, fp16(loss_scale_window=2, initial_scale_power=6))
    compare(results, truth(0.0))
    assert results[0]["scales"][-1] >= 4 * 2**6


def overflow(rank: int, world: int, stage: int, keys: dict[str, Any], steps: int) -> dict[str, Any]:
    """In the first windows one rank's gradients overflow while its loss stays finite."""
    allow_fp16()
    engine = make_engine(2, stage, gas=2, **fp16(**keys))
    scales, moved, message = [], [], ""
    before = weights_of(engine)
    for step in range(steps):
        for index, batch in enumerate(engine.shard([ragged_rows(step, i, engine.mesh.data_rank) for i in range(2)])):
            loss = engine(**batch).loss
            if rank == 2 and index == 0 and step < 2:
                loss = loss + 1e6 * (loss - loss.detach())
            engine.backward(loss)
            try:
                engine.step()
            except NonFiniteError as error:
                message = str(error)
        after = weights_of(engine)
        moved.append(not all(torch.equal(before[name], after[name]) for name in before))
        scales.append(loss_scale(engine))
        before = after
    result = {"scales": scales, "moved": moved, "skipped": engine.skipped_steps, "message": message}
    engine.destroy()
    return result


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.deep) for stage in (1, 2)), 3])
def test_an_overflow_on_one_rank_is_skipped_by_all(stage: int) -> None:
    for result in run_ranks(4, overflow, stage, {}, 3):
        assert result["moved"] == [False, False, True]
        assert result["scales"] == [512.0, 256.0, 256.0]
        assert result["skipped"] == 2 and result["message"] == ""


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.deep)])
def test_an_overflow_at_the_smallest_scale_is_named_on_every_rank(stage: int) -> None:
    for result in run_ranks(4, overflow, stage, {"min_loss_scale": 1024}, 1):
        assert "smallest loss scale, 1024" in result["message"] and "bf16" in result["message"]
        assert result["moved"] == [False]


def refused(rank: int, world: int) -> str:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False
    try:
        make_engine(2, 0, **fp16())
    except EngineError as error:
        return str(error)
    finally:
        allow_fp16()
    return ""


def test_a_device_without_fp16_is_refused_by_name() -> None:
    for message in run_ranks(2, refused):
        assert "fp16.enabled: true" in message and "bf16" in message


def resume(rank: int, world: int, stage: int, folder: str) -> dict[str, Any]:
    allow_fp16()

    def run(engine: Any, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            run_window(engine, [ragged_rows(step, index, engine.mesh.data_rank) for index in range(2)])
            losses.append(engine.global_loss)
        return losses

    engine = make_engine(2, stage, gas=2, **fp16(loss_scale_window=2, initial_scale_power=6))
    run(engine, 0, 4)
    engine.save_checkpoint(folder)
    scale, whole = loss_scale(engine), run(engine, 4, 6)
    engine.destroy()
    again = make_engine(2, stage, gas=2, **fp16(loss_scale_window=1000))
    again.load_checkpoint(folder)
    result = {"whole": whole, "scale": scale, "loaded": loss_scale(again), "resumed": run(again, 4, 6)}
    result["kept"] = loss_scale(again)
    again.destroy()
    return result


@pytest.mark.parametrize("stage", [0, 2])
def test_a_checkpoint_brings_the_scale_and_the_run_its_settings(stage: int, tmp_path: Any) -> None:
    for result in run_ranks(2, resume, stage, str(tmp_path)):
        assert result["loaded"] == result["scale"] > 2**6
        assert result["kept"] == result["scale"]  # by the new window; the old one would have doubled it
        torch.testing.assert_close(result["resumed"], result["whole"], rtol=tolerance("fp16"), atol=0)

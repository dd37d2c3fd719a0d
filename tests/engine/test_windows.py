"""longctx.windows: loops without DeepSpeed train as one process does on the whole rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_tiny import make_optimizer, ragged_rows, run_ranks, tiny_llama, train_plainly

from longctx.errors import EngineError

STEPS, ACCUMULATION, CLIP = 3, 2, 0.5


def batches(replica: int, last: int = ACCUMULATION, steps: int = STEPS) -> Iterator[dict[str, torch.Tensor]]:
    """One replica's micro-batches, step after step; the last step has only ``last``."""
    for step in range(steps):
        for index in range(last if step == steps - 1 else ACCUMULATION):
            yield ragged_rows(step, index, replica)


def wrapped(model: torch.nn.Module, how: str) -> Any:
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if how == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        grid = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=grid)
        fully_shard(model, mesh=grid)
    return model


def reduce(model: torch.nn.Module, average: str, mesh: Any) -> None:
    """What a loop by hand does between backward and step."""
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= {"world": mesh.world_size, "data": mesh.data_size, "none": 1}[average]


def trained(rank: int, world: int, ring: int, how: str, average: str, last: int) -> dict[str, list[float]]:
    import longctx

    mesh = longctx.Mesh(ring=ring)
    model = longctx.attach(tiny_llama(), mesh)
    net = wrapped(model, how)
    optimizer = make_optimizer("sgd", net.parameters())
    losses, norms = [], []
    windows = longctx.windows(batches(mesh.data_rank, last), mesh, ACCUMULATION, average=average)
    for window in windows:
        total = torch.zeros(())
        for batch in window:
            loss = net(**batch).loss
            loss.backward()
            total += loss.detach()
        if how == "hand":
            reduce(model, average, mesh)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        losses.append(windows.global_loss(total))
        optimizer.step()
        optimizer.zero_grad()
    assert windows.steps == STEPS
    return {"losses": losses, "norms": norms}


def reference(replicas: int, last: int) -> dict[str, Any]:
    """The same training in one process; micro-batches that the short last window lacks have no labels."""

    def rows(step: int, index: int, replica: int) -> dict[str, torch.Tensor]:
        found = ragged_rows(step, index, replica)
        missing = step == STEPS - 1 and index >= last
        return found | {"labels": torch.full_like(found["labels"], -100)} if missing else found

    model = tiny_llama()
    return train_plainly(
        model, make_optimizer("sgd", model.parameters()), steps=STEPS, replicas=replicas, accumulation=ACCUMULATION,
        clip=CLIP, rows=rows,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ring", "how", "average", "last"),
    [(2, "ddp", "world", 1), (2, "fsdp2", "world", 1), (2, "hand", "none", 2), (1, "hand", "data", 2)],
)
def test_two_ranks_train_as_one_process(ring: int, how: str, average: str, last: int) -> None:
    expected = reference(2 // ring, last)
    for found in run_ranks(2, trained, ring, how, average, last):
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)


@pytest.mark.deep
@pytest.mark.parametrize(("how", "average"), [("ddp", "world"), ("fsdp2", "world"), ("hand", "data")])
def test_a_ring_in_each_of_two_replicas(how: str, average: str) -> None:
    expected = reference(2, 1)
    for found in run_ranks(4, trained, 2, how, average, 1):
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def mismatched(rank: int, world: int, kind: str) -> str:
    """The message that a rank gets when the loaders of a ring disagree."""
    import longctx

    mesh = longctx.Mesh(ring=2)
    longctx.attach(tiny_llama(), mesh)

    def loader() -> Iterator[dict[str, torch.Tensor]]:
        yield from batches(0, steps=1)
        if kind == "longer" and rank == 1:
            yield ragged_rows(5, 0, 0)
        if kind == "different rows":
            yield ragged_rows(5, rank, 0)
        if kind == "an error" and rank == 1:
            raise OSError("the disk is gone")

    try:
        for _ in longctx.windows(loader(), mesh, ACCUMULATION):
            pass
    except (EngineError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        ("longer", ["windows of [0, 1] micro-batches"] * 2),
        ("different rows", ["share one sequence but passed different rows"] * 2),
        ("an error", ["ranks [1] rejected their micro-batches", "the disk is gone"]),
        ("equal", ["", ""]),
    ],
)
def test_loaders_that_disagree_are_an_error_on_every_rank(kind: str, messages: list[str]) -> None:
    for message, wanted in zip(run_ranks(2, mismatched, kind), messages, strict=True):
        assert wanted in message and bool(wanted) == bool(message)


def dropout_seeds(rank: int, world: int) -> list[list[int]]:
    import longctx

    mesh = longctx.Mesh(ring=2)
    model = longctx.attach(tiny_llama(attention_dropout=0.1), mesh).train()
    windows = longctx.windows(batches(0), mesh, ACCUMULATION, seed=7, start=3)
    return [batch["dropout_seeds"].tolist() for window in windows for batch in window if model.training]


def test_batches_carry_seeds_that_count_steps_and_micro_batches() -> None:
    from longctx.engine.dropout import row_seeds

    first, second = run_ranks(2, dropout_seeds)
    assert first == second
    assert first == [row_seeds(7, 3 + step, 2 * index, 2).tolist() for step in range(3) for index in range(2)]


def test_wrong_arguments_are_named() -> None:
    import longctx

    mesh = longctx.Mesh()
    model = longctx.attach(tiny_llama(), mesh)
    for problem, keywords in {
        "accumulation=0": {"accumulation": 0},
        "average='mean'": {"average": "mean"},
        "layout='striped', but the model was attached with 'zigzag'": {"layout": "striped"},
        "Linear is not attached to this mesh": {"model": torch.nn.Linear(1, 1)},
    }.items():
        with pytest.raises(EngineError, match=problem.replace("(", "\\(")):
            longctx.windows([], mesh, **keywords)
    other = longctx.attach(tiny_llama(attention_dropout=0.5), mesh)
    with pytest.raises(EngineError, match="2 models are attached"):
        longctx.windows([], mesh)
    assert len(longctx.windows([1, 2, 3], mesh, 2, model=other)) == 2
    del other
    assert model is mesh.attached_models()[0]


def test_a_model_of_ones_own_needs_no_attach() -> None:
    import longctx

    (window,) = longctx.windows([ragged_rows(0, 0, 0)], longctx.Mesh(), layout="contiguous")
    assert set(window[0]) >= {"input_ids", "shift_labels", "document_ids", "position_ids", "num_items_in_batch"}
    assert int(window[0]["num_items_in_batch"]) == int((window[0]["shift_labels"] >= 0).sum())

"""The engine trains exactly as one process would: gradients, norms, clipping, losses and weights, on every ZeRO path.

Rows are ragged and packed, with unequal numbers of labels per rank, micro-batch and replica. SGD is the judge: Adam
hides a constant factor in the gradients.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from engine_tiny import make_optimizer, ragged_rows, run_ranks, tiny_llama, train_plainly

from tolerances import tolerance

STEPS, ACCUMULATION, CLIP = 20, 2, 0.9
ALL_OPTIONS = list(itertools.product((True, False), (False, True), (False, True)))


def legal_cells() -> list[tuple[int, bool, bool, bool]]:
    """(stage, reduce_scatter, overlap_comm, offload): ZeRO 0 has no such options."""
    return [(0, True, False, False), *((stage, *options) for stage in (1, 2, 3) for options in ALL_OPTIONS)]


def settings(cell: tuple[int, bool, bool, bool], clip: float = CLIP) -> dict[str, Any]:
    stage, reduce_scatter, overlap_comm, offload = cell
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_scatter": reduce_scatter,
        "overlap_comm": overlap_comm,
        "reduce_bucket_size": 5000,  # a few buckets; and DeepSpeed allocates them whole
        "allgather_bucket_size": 5000,
        "stage3_prefetch_bucket_size": 5000,
        "stage3_param_persistence_threshold": 600,  # norms, k and v stay; larger matrices are partitioned
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "parameters too":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def trained(
    rank: int, world: int, ring: int, cell: tuple, optimizer: str, layout: str, layers: int, ulysses: int = 1
) -> dict[str, Any]:
    """Train on this rank's shards and return what the truth returns."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    import longctx

    mesh = longctx.Mesh(ring=ring, ulysses=ulysses)
    model = tiny_llama(num_hidden_layers=layers)
    engine, *_ = longctx.initialize(
        model, settings(cell), mesh, layout, optimizer=make_optimizer(optimizer, model.parameters())
    )
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        window = engine.shard([ragged_rows(step, index, mesh.data_rank) for index in range(ACCUMULATION)])
        for index, batch in enumerate(window):
            engine.backward(engine(**batch).loss)
            if step == 0 and index == ACCUMULATION - 1:
                gradients = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
            engine.step()
        losses.append(engine.global_loss)
        norms.append(engine.grad_norm)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


@functools.cache
def truth(replicas: int, optimizer: str, layers: int) -> dict[str, Any]:
    model = tiny_llama(num_hidden_layers=layers)
    return train_plainly(
        model,
        make_optimizer(optimizer, model.parameters()),
        steps=STEPS,
        replicas=replicas,
        accumulation=ACCUMULATION,
        clip=CLIP,
    )


def check(
    world: int, ring: int, cell: tuple, optimizer: str, layout: str = "zigzag", layers: int = 2, ulysses: int = 1
) -> None:
    results = run_ranks(world, trained, ring, cell, optimizer, layout, layers, ulysses)
    wanted = truth(world // (ring * ulysses), optimizer, layers)
    assert max(wanted["norms"]) > CLIP  # clipping is exercised
    assert min(wanted["norms"]) < CLIP or world == ring * ulysses  # and, over two replicas, not always on
    for result in results:
        torch.testing.assert_close(result["losses"], wanted["losses"], rtol=tolerance("training loss"), atol=0)
        torch.testing.assert_close(result["norms"], wanted["norms"], rtol=tolerance("training norm"), atol=0)
        for name, gradient in wanted["gradients"].items():
            error = (result["gradients"][name] - gradient).norm() / gradient.norm()
            assert error <= tolerance("training gradient"), (name, float(error))
        for name, weight in wanted["weights"].items():
            error = (result["weights"][name] - weight).norm() / weight.norm()
            assert error <= tolerance("training weight"), (name, float(error))


def name(value: Any) -> str | None:
    if not isinstance(value, tuple):
        return None
    options = zip(("", "reduce_scatter", "overlap_comm", "offload"), value, strict=True)
    return "+".join([f"zero{value[0]}", *(key for key, on in list(options)[1:] if on)])


FIRST = [(0, True, False, False), (1, False, False, False), (2, True, True, False), (3, True, True, False)]


def by_tier() -> list[Any]:
    """One cell per stage first. Of the others, those with an even number of options on hold every pair of values."""
    marks = [pytest.mark.slow if cell[0] and sum(cell[1:]) % 2 else pytest.mark.deep for cell in legal_cells()]
    cells = zip(legal_cells(), marks, strict=True)
    return [cell if cell in FIRST else pytest.param(cell, marks=mark) for cell, mark in cells]


@pytest.mark.parametrize("cell", by_tier(), ids=name)
def test_every_path_on_ring_2_data_2(cell: tuple[int, bool, bool, bool]) -> None:
    check(4, 2, cell, "sgd", layers=1)


ADAMW = [pytest.param(cell, marks=pytest.mark.deep if cell[0] != 1 else ()) for cell in legal_cells()[::8]]


@pytest.mark.parametrize("cell", ADAMW, ids=name)
def test_adamw_on_ring_2_data_2(cell: tuple[int, bool, bool, bool]) -> None:
    check(4, 2, cell, "adamw", layers=1)


PAIRWISE = [  # every pair of (mesh, stage), (mesh, option), (stage, option), (optimizer, …) at least once
    (1, 1, (0, True, False, False), "adamw"),
    (1, 1, (3, True, True, False), "sgd"),
    (1, 1, (2, False, False, True), "sgd"),
    (2, 1, (1, True, True, True), "adamw"),
    pytest.param(2, 1, (3, False, False, False), "sgd", marks=pytest.mark.deep),
    (2, 1, (0, True, False, False), "sgd"),
    (2, 2, (2, True, True, False), "adamw"),
    pytest.param(2, 2, (3, False, True, True), "sgd", marks=pytest.mark.deep),
    (2, 2, (0, True, False, False), "sgd"),
    (2, 2, (1, False, False, False), "sgd"),
    pytest.param(4, 4, (3, True, False, True), "adamw", marks=pytest.mark.deep),
    pytest.param(4, 4, (1, False, True, False), "sgd", marks=pytest.mark.deep),
    pytest.param(4, 4, (2, True, False, True), "sgd", marks=pytest.mark.deep),
    (4, 4, (0, True, False, False), "adamw"),
    (2, 2, (3, True, False, "parameters too"), "sgd"),
    pytest.param(4, 2, (3, True, True, "parameters too"), "adamw", marks=pytest.mark.deep),
]


@pytest.mark.parametrize(("world", "ring", "cell", "optimizer"), PAIRWISE, ids=name)
def test_other_meshes_pairwise(world: int, ring: int, cell: tuple, optimizer: str) -> None:
    check(world, ring, cell, optimizer)


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.deep)])
@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_other_layouts(layout: str, stage: int) -> None:
    check(4, 2, (stage, True, False, False), "sgd", layout)


HYBRID = [  # ring x ulysses 2 on four ranks
    pytest.param(2, (3, True, False, False), "sgd", "zigzag", marks=pytest.mark.deep),
    (1, (1, True, False, False), "adamw", "zigzag"),
    pytest.param(2, (0, True, False, False), "sgd", "zigzag", marks=pytest.mark.slow),
    pytest.param(2, (1, False, True, False), "sgd", "striped", marks=pytest.mark.slow),
    pytest.param(2, (2, True, False, True), "adamw", "contiguous", marks=pytest.mark.slow),
    pytest.param(2, (3, True, True, True), "adamw", "zigzag", marks=pytest.mark.slow),
    pytest.param(1, (0, True, False, False), "sgd", "zigzag", marks=pytest.mark.slow),
    pytest.param(1, (2, True, True, False), "sgd", "zigzag", marks=pytest.mark.slow),
    pytest.param(1, (3, False, False, False), "sgd", "zigzag", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ring", "cell", "optimizer", "layout"), HYBRID, ids=name)
def test_heads_exchanged_in_a_ring_and_between_replicas(ring: int, cell: tuple, optimizer: str, layout: str) -> None:
    check(4, ring, cell, optimizer, layout, layers=1, ulysses=2)


def grid() -> list[tuple[int, int, tuple, str]]:
    meshes = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)]
    return [(*mesh, cell, optimizer) for mesh in meshes for cell in legal_cells() for optimizer in ("sgd", "adamw")]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "ring", "cell", "optimizer"), grid(), ids=name)
def test_the_full_grid(world: int, ring: int, cell: tuple, optimizer: str) -> None:
    check(world, ring, cell, optimizer)

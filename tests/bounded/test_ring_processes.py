"""Bounded states over real processes: 1 to 4 ranks equal one device, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounded import direct, ranks, ring_states

from distributed import run_ranks
from tolerances import tolerance

SOME = [
    "prefix", "running", "linformer", "cluster", "dilated", "cosine value", "cosine query", "bidirectional",
    "bidirectional cosine",
]  # fmt: skip
PACKED = [[(-1, 3), (4, 17), (5, 23), (-1, 5)], [(2, 1), (3, 8), (7, 39)]]


def on_a_mesh(rank: int, world_size: int, layout: str) -> list[tuple[str, bool, ranks.Answer]]:
    import longctx

    mesh = longctx.Mesh(ring=world_size)
    here = ranks.indices(layout, world_size, 48)[rank]
    answers = []
    for name in SOME:
        for packed in (False, True):
            leaves, weight = ranks.inputs(name)
            ids = direct.packed(PACKED) if packed else None

            def run(mine: list[torch.Tensor], own: torch.Tensor | None, name: str = name) -> torch.Tensor:
                return ranks.call(name, mine, own, layout, None, mesh=mesh)

            answers.append((name, packed, ranks.local_answer(name, leaves, weight, ids, here, run)))
    return answers


@pytest.mark.parametrize(
    ("ring", "layout"),
    [(2, "zigzag"), (3, "contiguous"), pytest.param(4, "zigzag", marks=pytest.mark.deep)],
)
def test_processes_equal_one_device(ring: int, layout: str) -> None:
    by_rank = run_ranks(ring, on_a_mesh, layout)
    order = torch.cat(ranks.indices(layout, ring, 48)).argsort()
    for case in zip(*by_rank, strict=True):
        name, packed, _ = case[0]
        leaves, weight = ranks.inputs(name)
        expected = ranks.one_device(name, leaves, weight, direct.packed(PACKED) if packed else None)
        found = ranks.assemble(name, [answer for _, _, answer in case], order)
        assert max(direct.differences(found, expected)) <= tolerance("fp64"), (name, packed)


def test_a_mesh_of_one_equals_one_device() -> None:
    for name, packed, found in on_a_mesh(0, 1, "zigzag"):
        leaves, weight = ranks.inputs(name)
        expected = ranks.one_device(name, leaves, weight, direct.packed(PACKED) if packed else None)
        assert max(direct.differences(found, expected)) <= tolerance("fp64"), (name, packed)


def states_on_a_mesh(rank: int, world_size: int, names: list[str], layout: str) -> list[Any]:
    import longctx

    mesh = longctx.Mesh(ring=world_size)
    here = ranks.indices(layout, world_size, ring_states.LENGTH)[rank]
    answers = []
    for name in names:
        leaves, ids, state, weight = ring_states.setting(name, "packed")
        mine = ring_states.cut(name, leaves, here)
        answers.append(
            ring_states.vector(name, mine, weight[:, :, here], ids[:, here], state, world_size, layout, None, mesh)
        )
    return answers


@pytest.mark.parametrize(("ring", "layout"), [(2, "zigzag"), pytest.param(4, "contiguous", marks=pytest.mark.deep)])
def test_states_of_processes_equal_those_of_one_device(ring: int, layout: str) -> None:
    names = ["prefix", "running pair", "linformer", "cluster", "compressive", "cosine value"]
    by_rank = run_ranks(ring, states_on_a_mesh, names, layout)
    order = torch.cat(ranks.indices(layout, ring, ring_states.LENGTH)).argsort()
    for name, *found in zip(names, *by_rank, strict=True):
        leaves, ids, state, weight = ring_states.setting(name, "packed")
        ring_states.check(name, ring_states.vector(name, leaves, weight, ids, state, 1), found, order)


def with_heads_split(rank: int, world_size: int) -> str:
    import longctx

    mesh = longctx.Mesh(ulysses=world_size)
    q = torch.zeros(1, 2, 4, 3)
    try:
        longctx.cosine_attention(q, q, q, torch.zeros(2), mesh=mesh)
    except longctx.LongctxError as error:
        return str(error)
    return ""


def test_split_heads_are_refused() -> None:
    assert all("use Mesh(ring=2)" in message for message in run_ranks(2, with_heads_split))

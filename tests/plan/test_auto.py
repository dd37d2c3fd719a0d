"""The grid of `mesh: {ring: auto, ulysses: auto}`: the planner's best grid is hardly ever faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from longctx.config.derived import derive, world_size
from longctx.config.load import load
from longctx.config.topology import has_bounded_layers, heads
from longctx.config.ulysses import UlyssesLimits, choose_ulysses
from longctx.plan.machines import MACHINES, Machine
from longctx.plan.setup import Setup, setup_of
from longctx.plan.shape import ModelShape, shape_of
from longctx.plan.speed import speed_of

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)
MODELS = {
    "32:8": LLAMA_8B,
    "64:8": replace(LLAMA_8B, hidden=8192, heads=64, inner=28672, layers=80),
    "32:32": replace(LLAMA_8B, kv_heads=32),
    "32:2": replace(LLAMA_8B, kv_heads=2),
    "12:3": replace(LLAMA_8B, hidden=1536, heads=12, kv_heads=3, inner=4096, layers=12),
    "16:1": replace(LLAMA_8B, heads=16, kv_heads=1),
}
WORLDS, LOCAL = (2, 4, 8, 16, 32, 128, 512), (2048, 4096, 16384, 131072)


def share_of_best(shape: ModelShape, setup: Setup, machine: Machine, ulysses: int) -> float:
    """Predicted tokens/s with this many members, as a share of the best grid's whose members have whole heads."""
    world = setup.sequence
    speeds = {
        members: speed_of(shape, replace(setup, ring=world // members, ulysses=members), machine).tokens_per_second
        for members in range(1, min(world, machine.per_node, shape.heads) + 1)
        if not (world % members or shape.heads % members or min(world, machine.per_node) % members)
    }
    return speeds[ulysses] / max(speeds.values())


def spread(shape: ModelShape) -> Iterator[tuple[str, int, int, float]]:
    for name, machine in MACHINES.items():
        for world in WORLDS:
            for local in LOCAL:
                if name == "cpu" and (world > 8 or local > 4096):
                    continue
                ulysses = choose_ulysses(
                    world, UlyssesLimits(shape.kv_heads, min(world, machine.per_node), shape.heads)
                )
                setup = Setup(
                    local * world, ring=world, recompute="layer_keep_attention", loss_tile=1040, mlp_tile=4096,
                    overlap_comm=True,
                )  # fmt: skip
                yield name, world, local, share_of_best(shape, setup, machine, ulysses)


@pytest.mark.parametrize("name", MODELS)
def test_auto_is_within_five_per_cent_of_the_planners_best(name: str) -> None:
    """From 2,048 tokens per rank on. With uneven heads one choice in fifty may lose up to 8 %."""
    shape = MODELS[name]
    found = list(spread(shape))
    missed = [each for each in found if each[-1] < 0.95]
    even = shape.heads % 8 == 0 and shape.kv_heads > 1
    assert len(missed) <= (0 if even else len(found) / 50), missed
    assert all(each[-1] >= 0.92 for each in missed), missed


@pytest.mark.parametrize("path", sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml")), ids=str)
def test_auto_suits_every_preset(path: Path) -> None:
    named = path.stem.rpartition("-")[2]
    machine = MACHINES[named if named in MACHINES else "cpu" if "gpu" not in named else "h100"]
    given = load(path, default_world=machine.per_node)
    world = world_size(given, machine.per_node)
    per_host = min(world, machine.per_node)
    config = load(path, ["mesh.ring=auto", "mesh.ulysses=auto"], default_world=world)
    shape = shape_of(config)
    setup = setup_of(config, derive(config, world), shape, on_gpu=machine.name != "cpu")
    sequence = setup.sequence
    if has_bounded_layers(config):
        assert setup.ulysses == 1
        return
    queries, keys = heads(config)
    ulysses = choose_ulysses(sequence, UlyssesLimits(keys, per_host, queries))
    assert share_of_best(shape, replace(setup, ring=sequence, ulysses=1), machine, ulysses) >= 0.95


def test_several_hosts_go_by_query_heads() -> None:
    assert choose_ulysses(8, UlyssesLimits(2, 8, 32)) == 2, "one host: no copies of key heads"
    assert choose_ulysses(64, UlyssesLimits(2, 8, 32)) == 8, "several: blocks cross the network"
    assert choose_ulysses(64, UlyssesLimits(3, 8, 12)) == 4
    assert choose_ulysses(64, UlyssesLimits(8, None, 32)) == choose_ulysses(64, UlyssesLimits(None, 8, 32)) == 1

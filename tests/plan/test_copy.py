"""A copy of the weights in every node (`zero.group`): its predicted bytes, traffic and gain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from config_samples import load_variant
from hypothesis import given
from hypothesis import strategies as st

from longctx.config.derived import derive
from longctx.plan.choose import choose
from longctx.plan.limit import further, longest
from longctx.plan.machines import MACHINES
from longctx.plan.memory import step_bytes
from longctx.plan.plan import as_json, make_plan
from longctx.plan.setup import Setup, setup_of
from longctx.plan.shape import ModelShape, shape_of
from longctx.plan.speed import group_link, speed_of, world_link
from longctx.plan.states import weight_bytes
from longctx.plan.work import wire_of, zero_sent

LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)
LLAMA_70B = ModelShape(8192, 80, 64, 8, 128, 28672, 128256)


@given(st.integers(1, 5), st.sampled_from([None, 2, 8]), st.booleans(), st.integers(1, 3))
def test_all_gathers_of_a_step_but_the_first_stay_in_the_node(
    accumulation: int, group: int | None, stays: bool, data: int
) -> None:
    """Beside a walk through a step: the first gather after an update finds no copy yet."""
    shape = replace(LLAMA_8B, layers=2)
    live = shape.parameters if stays else shape.parameters - 1  # does the model stay gathered from forward to backward?
    setup = Setup(2**18, ring=32, data=data, accumulation=accumulation, group=group, live=live)
    wide = near = 0.0
    copied = False
    for _ in range(accumulation):
        for _ in ("forward",) if stays else ("forward", "backward"):
            if copied:
                near += 2 * shape.parameters * (group - 1) / group
            else:
                wide += 2 * shape.parameters * (setup.world - 1) / setup.world
            copied = group is not None
        wide += 4 * shape.parameters * (setup.world - 1) / setup.world  # gradients, in fp32
    sent = zero_sent(shape, setup)
    assert [accumulation * part for part in sent] == pytest.approx([wide, near], rel=1e-6, abs=accumulation)
    assert wire_of(shape, setup).zero == sum(sent)


def test_the_copy_is_held_beside_the_parts() -> None:
    plain = Setup(2**20, ring=64)
    copied = replace(plain, group=8)
    assert weight_bytes(LLAMA_8B, copied) == weight_bytes(LLAMA_8B, plain) + 2 * -(-LLAMA_8B.parameters // 8)
    assert weight_bytes(LLAMA_8B, replace(copied, stage=2)) == weight_bytes(LLAMA_8B, replace(plain, stage=2))
    host = step_bytes(LLAMA_8B, replace(copied, offload_parameters=True)).host["weights"]
    assert host == weight_bytes(LLAMA_8B, copied)
    assert step_bytes(LLAMA_8B, copied).peak.total > step_bytes(LLAMA_8B, plain).peak.total


def test_the_plan_shows_it_and_says_how_to_go_further() -> None:
    machine = MACHINES["h200"]
    setup = Setup(2**20, ring=32, group=8, recompute="layer_keep_attention", loss_tile=2048, mlp_tile=4096)
    assert as_json(make_plan(LLAMA_8B, setup, machine))["zero"] == {"stage": 3, "group": 8}
    without = next(change for change in further(LLAMA_70B, setup, machine) if change.what == "zero.group: none")
    assert without.longest == longest(LLAMA_70B, replace(setup, group=None), machine)
    assert without.longest > longest(LLAMA_70B, setup, machine)


def test_it_wins_where_the_network_is_slower_than_the_node() -> None:
    setup, slow = Setup(2**15, ring=8, data=16), replace(MACHINES["h100"], network=5e9)
    copied = replace(setup, group=8)
    assert group_link(copied, slow) == slow.link > world_link(copied, slow)
    assert group_link(replace(copied, group=16), slow) == world_link(copied, slow)
    plain, kept = (speed_of(LLAMA_70B, each, slow).seconds["ZeRO, exposed"] for each in (setup, copied))
    assert kept < plain
    for machine in MACHINES.values():
        assert speed_of(LLAMA_70B, copied, machine).total <= speed_of(LLAMA_70B, setup, machine).total


def test_the_choice_takes_it_where_it_wins_and_not_for_nothing() -> None:
    """The figures stand in docs/plan.md."""
    machine = MACHINES["b200"]
    taken = choose(LLAMA_70B, 2**15, machine, 128)
    assert taken.setup.group == machine.per_node and taken.yaml["zero.group"] == 8
    plain = speed_of(LLAMA_70B, replace(taken.setup, group=None), machine).tokens_per_second
    assert taken.tokens_per_second / plain == pytest.approx(1.07, abs=0.01)
    for name, tokens, world in (("h200", 2**23, 32), ("h200", 2**25, 128), ("b200", 2**15, 8)):
        left = choose(LLAMA_8B, tokens, MACHINES[name], world)
        assert left.setup.group is None and left.yaml["zero.group"] == "none"


def on(*hosts: str) -> dict[str, Any]:
    return {"launch__launcher": "openmpi", "launch__hosts": list(hosts)}


@pytest.mark.parametrize(
    ("changes", "world", "group"),
    [
        ({"zero__group": "none"}, 8, None),
        ({"zero__group": 2}, 8, 2),
        ({"zero__group": "auto"}, 8, None),  # one host
        ({"zero__group": "auto", **on("a:4", "b:4")}, 8, 4),
        ({"zero__group": "auto", **on("a:4", "b:4"), "zero__stage": 2}, 8, None),
        ({"zero__group": "auto", **on("a:6", "b:2")}, 8, 2),
        ({"zero__group": "auto", **on("a:1", "b:1")}, 2, None),
    ],
)  # fmt: skip
def test_auto_is_the_ranks_of_a_host(changes: dict[str, Any], world: int, group: int | None) -> None:
    grid = {"mesh__world": world, "mesh__ring": 2, "mesh__data": world // 2, "train__global_batch": world // 2}
    config = load_variant(**{"zero__stage": 3, **grid, **changes}).config
    sizes = derive(config, world)
    assert sizes.group == setup_of(config, sizes, shape_of(config)).group == group
    if changes == {"zero__group": "auto"}:
        assert setup_of(config, sizes, shape_of(config), per_node=4).group == 4

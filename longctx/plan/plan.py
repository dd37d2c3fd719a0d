"""Predict one run on one machine: what `longctx plan` prints, as an object and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longctx.plan.limit import Switch, fits, further, longest
from longctx.plan.machines import Machine
from longctx.plan.memory import StepBytes, step_bytes
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape
from longctx.plan.speed import Speed, speed_of
from longctx.plan.work import Flops, Wire, flops_of, wire_of

_KEYS = {  # label in the tables -> key of the JSON, which keeps its first names for programs that read it
    "saved activations": "kept results",
    "active layer": "layer at work",
    "matrix products": "products",
    "all-to-all of heads": "heads exchanged",
}


@dataclass(frozen=True)
class Plan:
    """All predictions for one run."""

    shape: ModelShape
    setup: Setup
    machine: Machine
    step_bytes: StepBytes
    speed: Speed
    flops: Flops
    wire: Wire
    fits: bool
    longest: int
    further: list[Switch]


def make_plan(shape: ModelShape, setup: Setup, machine: Machine) -> Plan:
    """Predict a run's memory, time, traffic and longest sequence, and what would make it longer."""
    return Plan(
        shape=shape,
        setup=setup,
        machine=machine,
        step_bytes=step_bytes(shape, setup),
        speed=speed_of(shape, setup, machine),
        flops=flops_of(shape, setup),
        wire=wire_of(shape, setup),
        fits=fits(shape, setup, machine),
        longest=longest(shape, setup, machine),
        further=further(shape, setup, machine),
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain dictionaries; bytes, FLOPs and traffic are per rank."""
    setup, speed, wire = plan.setup, plan.speed, plan.wire
    return {
        "machine": plan.machine.name,
        "ranks": {"world": setup.world, "data": setup.data, "ring": setup.ring, "ulysses": setup.ulysses},
        "zero": {"stage": setup.stage, "group": setup.group},
        "tokens": {"row": setup.tokens, "local": setup.local, "step": _tokens(setup)},
        "parameters": plan.shape.parameters,
        "memory": {
            "device_bytes": plan.machine.memory,
            "usable_bytes": plan.machine.usable,
            "peak_bytes": plan.step_bytes.peak.total,
            "peak_at": plan.step_bytes.peak.name,
            "fits": plan.fits,
            "moments": {
                moment.name: _keyed(moment.parts) | {"total": moment.total} for moment in plan.step_bytes.moments
            },
            "host_bytes": _keyed(plan.step_bytes.host),
        },
        "step": {
            "seconds": speed.total,
            "seconds_by": _keyed(speed.seconds),
            "mfu": speed.mfu,
            "tokens_per_second": speed.tokens_per_second,
            "flops": plan.flops.done * setup.accumulation,
            "useful_flops": plan.flops.useful * setup.accumulation,
            "wire_bytes": {
                "ring": (wire.ring_forward + wire.ring_backward) * setup.accumulation,
                "ulysses": wire.ulysses * setup.accumulation,
                "states": wire.states * setup.accumulation,
                "zero": wire.zero * (setup.accumulation if setup.stage == 3 else 1),
            },
        },
        "overlap": {
            "tokens": speed.overlap.tokens,
            "least_forward": speed.overlap.least_forward,
            "least_backward": speed.overlap.least_backward,
            "hidden": speed.overlap.hidden,
        },
        "longest": plan.longest,
        "further": [
            {"change": change.what, "longest": change.longest, "peak_bytes": change.peak} for change in plan.further
        ],
    }


def _keyed(values: Mapping[str, float]) -> dict[str, float]:
    return {_KEYS.get(name, name): value for name, value in values.items()}


def _tokens(setup: Setup) -> int:
    return setup.tokens * setup.rows * setup.accumulation * setup.data

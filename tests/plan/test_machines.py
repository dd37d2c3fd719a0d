"""Machines by name."""

from __future__ import annotations

import pytest

from longctx.errors import ConfigError
from longctx.plan.machines import GIB, MACHINES, machine_named


def test_machines_are_known_by_name() -> None:
    assert machine_named("H100").memory == 80 * GIB and machine_named("MI-300X").name == "mi300x"
    with pytest.raises(ConfigError, match="h100"):
        machine_named("h1000")


def test_figures_are_fractions_and_orders_of_magnitude() -> None:
    """Kernels stay below the peak, and links get slower from the device outwards."""
    for name, machine in MACHINES.items():
        assert machine.name == name and 0 < machine.usable < machine.memory
        assert all(0 < share < 1 for share in (machine.matmul, machine.attention, machine.attention_backward))
        assert machine.bandwidth > machine.link > machine.network and machine.latency <= machine.network_latency

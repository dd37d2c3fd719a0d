"""Simulate one layer's attention on 8 to 1,024 devices, message by message, with the schedule that training uses.

Each device has a compute stream and one outgoing channel. Its messages are sent in order; each takes latency + bytes /
bandwidth of the link within its node or of its network card. In each stage of the ring, a rank posts its messages,
computes the (query, key) pairs that it sees, and waits for its sends and receives, as `attention/passes.py` does.
Ulysses groups run all-to-alls before and after. The rings of a hybrid run alike, so one of them is simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2

from longctx.attention.band import make_rule
from longctx.attention.schedule import Stage, make_schedule, work
from longctx.plan.machines import Machine
from longctx.plan.speed import ALL_TO_ALL, SMALL
from longctx.plan.traffic import Layer, all_to_all_sent


@dataclass(frozen=True)
class Kernel:
    """FLOP/s of a fused kernel on long blocks. `merge`: bytes/s of a separate pass that merges partial results (None:
    the kernel merges them)."""

    forward: float
    backward: float
    merge: float | None = None

    def seconds(self, layer: Layer, pairs: float, backward: bool) -> float:
        """Return the compute time of one stage on one rank."""
        if not pairs:
            return 0.0
        rate = (self.backward if backward else self.forward) * layer.block / (layer.block + SMALL)
        heads = layer.heads / layer.ulysses
        partial = 4 * layer.block * heads * layer.head_dim  # bytes, fp32
        merging = 3 * partial / self.merge if self.merge is not None and layer.ring > 1 else 0.0
        return (10.0 if backward else 4.0) * heads * layer.head_dim * pairs / rate + merging


@dataclass
class SimulatedPass:
    """One simulated pass: its duration, and per rank the seconds of compute, the bytes and the messages sent."""

    seconds: float
    busy: list[float]
    sent: list[int]
    messages: list[int]

    @property
    def exposed(self) -> float:
        """Share of the time in which the busiest rank does not compute."""
        return 1 - max(self.busy) / self.seconds


def attention_pass(layer: Layer, machine: Machine, kernel: Kernel, *, backward: bool = False) -> SimulatedPass:
    """Simulate one pass of ring, Ulysses or hybrid attention."""
    outcome = _ring(layer, machine, kernel, backward)
    if layer.ulysses > 1:
        sent, messages = all_to_all_sent(layer, backward=backward)
        outcome.seconds += _all_to_all(layer, machine, sent * layer.ulysses / (layer.ulysses - 1))
        outcome.sent = [value + sent for value in outcome.sent]
        outcome.messages = [value + messages for value in outcome.messages]
    return outcome


def gathered_pass(layer: Layer, machine: Machine, kernel: Kernel, *, backward: bool = False) -> SimulatedPass:
    """Simulate attention that gathers all keys and values first, and reduce-scatters their gradients last, without
    overlap."""
    world = layer.world
    own = 2 * layer.local * layer.kv_heads * layer.head_dim
    size = own * (layer.gradient_itemsize + layer.itemsize if backward else layer.itemsize)
    seconds = _collective(machine, world, size)
    rate = (kernel.backward if backward else kernel.forward) * layer.local / (layer.local + SMALL)
    busy = layer.flops(backward) / world / rate
    return SimulatedPass(seconds + busy, [busy] * world, [size * (world - 1)] * world, [1 + backward] * world)


def scan_pass(world: int, state_bytes: int, machine: Machine, compute: float) -> SimulatedPass:
    """Simulate a bounded-state layer: one all-gather of states, independent of the length, and ``compute`` seconds per
    rank."""
    seconds = _collective(machine, world, state_bytes)
    return SimulatedPass(compute + seconds, [compute] * world, [state_bytes * (world - 1)] * world, [1] * world)


def _ring(layer: Layer, machine: Machine, kernel: Kernel, backward: bool) -> SimulatedPass:
    """Simulate the ring, stage by stage."""
    ring, rule = layer.ring, make_rule(True, layer.window)
    schedule = make_schedule(layer.layout, ring, layer.tokens, rule)
    pairs = work(layer.layout, ring, layer.tokens, rule)
    plans = [schedule.stages(rank) for rank in range(ring)]
    clock = [0.0] * ring  # per rank: when its current stage begins
    free = [0.0] * ring  # per rank: when its outgoing channel is free
    outcome = SimulatedPass(0.0, [0.0] * ring, [0] * ring, [0] * ring)
    for number in range(len(plans[0]) if backward else len(plans[0]) - 1):  # backward's last stage only sends gradients
        # A rank's stage is done when its pairs are computed …
        done = []
        for rank, plan in enumerate(plans):
            stage = plan[number]
            seen = pairs[rank][stage.source] if stage.compute and stage.source is not None else 0
            seconds = kernel.seconds(layer, seen, backward)
            outcome.busy[rank] += seconds
            done.append(clock[rank] + seconds)
        # … its messages are sent, and those for it have arrived.
        for rank, plan in enumerate(plans):
            for peer, size, pieces in _sends(layer, plan[number], backward):
                bandwidth, latency = _hop(layer, machine, rank, peer)
                begin = max(clock[rank], free[rank])
                free[rank] = begin + size / bandwidth
                arrival = free[rank] + latency * pieces
                done[peer], done[rank] = max(done[peer], arrival), max(done[rank], free[rank])
                outcome.sent[rank] += size
                outcome.messages[rank] += pieces
        clock = done
    outcome.seconds = max(clock)
    return outcome


def _sends(layer: Layer, stage: Stage, backward: bool) -> list[tuple[int, int, int]]:
    """Return (ring rank, bytes, messages) of each send of a stage. A rank's own block is sent as k, v (and ids)."""
    found = []
    if stage.kv_to is not None:
        found.append((stage.kv_to, layer.kv_bytes, 2 + layer.documents if stage.chain_begins else 1))
    if backward and stage.grad_to is not None:
        found.append((stage.grad_to, layer.gradient_bytes, 1))
    return found


def _hop(layer: Layer, machine: Machine, rank: int, peer: int) -> tuple[float, float]:
    """Return (bandwidth, latency) between two ring ranks."""
    nodes = {index * layer.ulysses // machine.per_node for index in (rank, peer)}
    return (machine.link, machine.latency) if len(nodes) == 1 else (machine.network, machine.network_latency)


def _all_to_all(layer: Layer, machine: Machine, size: float) -> float:
    """Return the seconds of the two all-to-alls of ``size`` bytes: traffic within the node and across nodes overlaps,
    and every byte is copied before and after."""
    members = layer.ulysses
    each, inside = size / members, min(members, machine.per_node) - 1
    outside = members - 1 - inside
    slowest = max(
        inside * each / (ALL_TO_ALL * machine.link),
        outside * each / (ALL_TO_ALL * machine.network),
    )
    latency = machine.latency if not outside else machine.network_latency
    return 2 * latency + slowest + 4 * size / machine.bandwidth


def _collective(machine: Machine, world: int, own: int) -> float:
    """Return the seconds of an all-gather of ``own`` bytes per rank. Across nodes it uses all network cards of a
    node."""
    inside = min(world, machine.per_node)
    nodes = ceil(world / machine.per_node)
    within = own * (world - 1) / machine.link
    across = own * inside * (nodes - 1) / (inside * machine.network)
    latency = machine.latency * ceil(log2(max(inside, 2))) + machine.network_latency * ceil(log2(max(nodes, 1)))
    return latency + max(within, across)


def rate_of(
    layer: Layer, simulate: Callable[..., SimulatedPass], machine: Machine, kernel: Kernel, backward: bool
) -> float:
    """Return the useful FLOP/s per device in one pass."""
    return layer.flops(backward) / layer.world / simulate(layer, machine, kernel, backward=backward).seconds

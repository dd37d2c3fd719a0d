"""A simulated cluster: one layer's attention on 8 to 1,024 devices, event by event, from the schedule that runs.

Every device has a compute stream and a channel out of it; messages go one after another, each latency + bytes /
bandwidth of the link in its node or of its network card. A stage of the ring posts its messages, computes the pairs
that its rank really sees, and waits for what it sent and what it is to receive: `Passes`, with time instead of tensors.
The members of a Ulysses group exchange heads before and after; rings of a hybrid run alike, so one of them is played.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2

from longctx.attention.band import make_rule
from longctx.attention.schedule import Stage, make_schedule, work
from longctx.plan.machines import Machine
from longctx.plan.speed import ALL_TO_ALL, SMALL
from longctx.plan.traffic import Layer, exchange_sent


@dataclass(frozen=True)
class Kernel:
    """FLOP/s of a fused kernel on long blocks; `merge` bytes/s where partial results are merged by a pass of their own
    (None: within the kernel)."""

    forward: float
    backward: float
    merge: float | None = None

    def seconds(self, layer: Layer, pairs: float, backward: bool) -> float:
        """One stage's computation on one rank."""
        if not pairs:
            return 0.0
        rate = (self.backward if backward else self.forward) * layer.block / (layer.block + SMALL)
        heads = layer.heads / layer.ulysses
        result = 4 * layer.block * heads * layer.head_dim
        merging = 3 * result / self.merge if self.merge is not None and layer.ring > 1 else 0.0
        return (10.0 if backward else 4.0) * heads * layer.head_dim * pairs / rate + merging


@dataclass
class SimulatedPass:
    """One pass: when the last rank is done, and what each rank computed and sent."""

    seconds: float
    busy: list[float]
    sent: list[int]
    messages: list[int]

    @property
    def exposed(self) -> float:
        """Share of the time in which the busiest rank did not compute."""
        return 1 - max(self.busy) / self.seconds


def attention_pass(layer: Layer, machine: Machine, kernel: Kernel, *, backward: bool = False) -> SimulatedPass:
    """Play one pass of ring, Ulysses or hybrid attention."""
    outcome = _ring(layer, machine, kernel, backward)
    if layer.ulysses > 1:
        sent, messages = exchange_sent(layer, backward=backward)
        outcome.seconds += _all_to_all(layer, machine, sent * layer.ulysses / (layer.ulysses - 1))
        outcome.sent = [value + sent for value in outcome.sent]
        outcome.messages = [value + messages for value in outcome.messages]
    return outcome


def gathered_pass(layer: Layer, machine: Machine, kernel: Kernel, *, backward: bool = False) -> SimulatedPass:
    """Play attention that gathers all keys and values first (and scatters their gradients last): nothing is hidden."""
    world = layer.world
    own = 2 * layer.local * layer.kv_heads * layer.head_dim
    size = own * (layer.gradient_itemsize + layer.itemsize if backward else layer.itemsize)
    seconds = _collective(machine, world, size)
    rate = (kernel.backward if backward else kernel.forward) * layer.local / (layer.local + SMALL)
    busy = layer.flops(backward) / world / rate
    return SimulatedPass(seconds + busy, [busy] * world, [size * (world - 1)] * world, [1 + backward] * world)


def scan_pass(world: int, state_bytes: int, machine: Machine, compute: float) -> SimulatedPass:
    """Play a layer of bounded memory: one all-gather of states, whatever the length; ``compute`` seconds on a rank."""
    seconds = _collective(machine, world, state_bytes)
    return SimulatedPass(compute + seconds, [compute] * world, [state_bytes * (world - 1)] * world, [1] * world)


def _ring(layer: Layer, machine: Machine, kernel: Kernel, backward: bool) -> SimulatedPass:
    ring, rule = layer.ring, make_rule(True, layer.window)
    schedule = make_schedule(layer.layout, ring, layer.tokens, rule)
    pairs = work(layer.layout, ring, layer.tokens, rule)
    plans = [schedule.stages(rank) for rank in range(ring)]
    clock, free = [0.0] * ring, [0.0] * ring
    outcome = SimulatedPass(0.0, [0.0] * ring, [0] * ring, [0] * ring)
    for number in range(len(plans[0]) if backward else len(plans[0]) - 1):
        done = []
        for rank, plan in enumerate(plans):
            stage = plan[number]
            seen = pairs[rank][stage.source] if stage.compute and stage.source is not None else 0
            seconds = kernel.seconds(layer, seen, backward)
            outcome.busy[rank] += seconds
            done.append(clock[rank] + seconds)
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
    """(ring rank, bytes, messages) of what a stage sends: a block that sets out from home goes as k and v."""
    found = []
    if stage.kv_to is not None:
        found.append((stage.kv_to, layer.kv_bytes, 2 + layer.documents if stage.chain_begins else 1))
    if backward and stage.grad_to is not None:
        found.append((stage.grad_to, layer.gradient_bytes, 1))
    return found


def _hop(layer: Layer, machine: Machine, rank: int, peer: int) -> tuple[float, float]:
    """(bandwidth, latency) between two ring ranks."""
    nodes = {index * layer.ulysses // machine.per_node for index in (rank, peer)}
    return (machine.link, machine.latency) if len(nodes) == 1 else (machine.network, machine.network_latency)


def _all_to_all(layer: Layer, machine: Machine, size: float) -> float:
    """Seconds of exchanging ``size`` bytes of heads for tokens there, and results back: what stays in the node and what
    leaves it travel at once, and everything is copied once before and after."""
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
    """Seconds of an all-gather of ``own`` bytes a rank: over nodes, all network cards of a node work together."""
    inside = min(world, machine.per_node)
    nodes = ceil(world / machine.per_node)
    within = own * (world - 1) / machine.link
    across = own * inside * (nodes - 1) / (inside * machine.network)
    latency = machine.latency * ceil(log2(max(inside, 2))) + machine.network_latency * ceil(log2(max(nodes, 1)))
    return latency + max(within, across)


def rate_of(
    layer: Layer, play: Callable[..., SimulatedPass], machine: Machine, kernel: Kernel, backward: bool
) -> float:
    """Useful FLOP/s of one device in one pass."""
    return layer.flops(backward) / layer.world / play(layer, machine, kernel, backward=backward).seconds

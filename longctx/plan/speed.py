"""How long a step takes on a named machine: compute at reached rates, messages by latency + bytes / bandwidth (α-β).

A stage of the ring takes the longer of its computation and its message. What Ulysses exchanges is not hidden. ZeRO's
traffic hides behind a step's computation as far as that reaches, and so do offloaded checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from longctx.plan import activations, states
from longctx.plan.machines import Machine
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape
from longctx.plan.traffic import Layer, exchange_sent, hops_of
from longctx.plan.work import bounded_pairs, exact_pairs, flops_of, layer_of, zero_sent

ALL_TO_ALL = 0.85  # of a point-to-point message's bandwidth
SMALL = 450  # tokens of a block at which a fused kernel reaches half of its rate (H100, FlashAttention-3's chart)
TAIL = 0.02  # of a step: norms, rotary embeddings and launches that nothing above counts


@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step, by what they are spent on; useful FLOPs as a share of the peak; overlap."""

    seconds: dict[str, float]
    mfu: float
    tokens_per_second: float
    """of the whole world"""
    overlap: Overlap

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Overlap:
    """Whether a stage's message hides behind its computation (docs/methods/ring.md "Overlap").

    `least` is the fewest tokens a rank must hold: forward c >= b (G/H) F/B, backward c >= 2 ((b + 4)/5) (G/H) F/B, F
    the reached FLOP/s of attention and B the bandwidth; without causality (and for contiguous shards) half of it.
    """

    tokens: int
    least_forward: float
    least_backward: float

    @property
    def hidden(self) -> bool:
        return self.tokens >= max(self.least_forward, self.least_backward)


def overlap_of(shape: ModelShape, setup: Setup, machine: Machine) -> Overlap:
    """Return the overlap condition of this run's ring."""
    if setup.ring == 1 or shape.full_layers + shape.window_layers == 0:
        return Overlap(setup.local, 0.0, 0.0)
    bandwidth, _ = ring_link(setup, machine)
    group, b = shape.kv_heads / shape.heads, shape.itemsize
    half = 1.0 if setup.layout != "contiguous" else 0.5
    forward = half * b * group * machine.peak * machine.attention / bandwidth
    backward = half * 2 * (b + 4) / 5 * group * machine.peak * machine.attention_backward / bandwidth
    return Overlap(setup.local, forward / setup.ulysses, backward / setup.ulysses)


def ring_link(setup: Setup, machine: Machine) -> tuple[float, float]:
    """Return (bandwidth, latency) of the ring's slowest hop: ranks of one sequence stand side by side on nodes."""
    inside = setup.sequence <= machine.per_node
    return (machine.link, machine.latency) if inside else (machine.network, machine.network_latency)


def ulysses_link(setup: Setup, machine: Machine) -> tuple[float, float]:
    """Return (bandwidth, latency) of the exchange of heads."""
    inside = setup.ulysses <= machine.per_node
    found = (machine.link, machine.latency) if inside else (machine.network, machine.network_latency)
    return ALL_TO_ALL * found[0], found[1]


def world_link(setup: Setup, machine: Machine) -> float:
    """Return the bandwidth of a collective over all ranks: over nodes all network cards of a node work together."""
    return machine.link if setup.world <= machine.per_node else min(machine.link, machine.per_node * machine.network)


def group_link(setup: Setup, machine: Machine) -> float:
    """Return the bandwidth of a collective among the ranks that hold a copy of the weights together."""
    return machine.link if setup.group and setup.group <= machine.per_node else world_link(setup, machine)


def speed_of(shape: ModelShape, setup: Setup, machine: Machine) -> Speed:
    """Predict one optimizer step."""
    flops, times = flops_of(shape, setup), setup.accumulation
    products = (flops.products + flops.again_products) / (machine.peak * machine.matmul)
    passes = 1 + (setup.recompute == "layer")
    forward, forward_bare = ring_pass(shape, setup, machine, backward=False)
    backward, backward_bare = ring_pass(shape, setup, machine, backward=True)
    exchanges = [all_to_all(shape, setup, machine, backward=back) for back in (False, True)]
    exchange = exact_layers(shape) * (passes * exchanges[0] + exchanges[1])
    compute = products + passes * forward + backward
    seconds = {
        "products": times * products,
        "attention": times * (passes * forward_bare + backward_bare),
        "ring, exposed": times * (passes * (forward - forward_bare) + backward - backward_bare),
        "heads exchanged": times * exchange,
        "ZeRO, exposed": _zero(shape, setup, machine, compute, times),
        "checkpoints, exposed": times * max(_checkpoints(shape, setup, machine) - 0.9 * compute, 0.0),
        "optimizer": _optimizer(shape, setup, machine),
    }
    seconds["rest"] = TAIL * sum(seconds.values())
    total = sum(seconds.values())
    tokens = setup.tokens * setup.rows * times * setup.data
    return Speed(
        {name: value for name, value in seconds.items() if value > 0},
        times * flops.useful / total / machine.peak,
        tokens / total,
        overlap_of(shape, setup, machine),
    )


def exact_layers(shape: ModelShape) -> int:
    """Layers whose keys and values travel."""
    return shape.full_layers + shape.window_layers


def ring_pass(shape: ModelShape, setup: Setup, machine: Machine, *, backward: bool) -> tuple[float, float]:
    """Return the seconds of all layers' attention in one pass: with messages, and of the busiest rank without them."""
    block = setup.local * setup.ulysses
    rate = machine.peak * (machine.attention_backward if backward else machine.attention) * block / (block + SMALL)
    each = (10.0 if backward else 4.0) * shape.q_width * setup.rows / setup.sequence / rate  # seconds of a row's pair
    whole = bare = each * shape.bounded_layers * bounded_pairs(shape, setup.tokens)
    for layers, window in ((shape.full_layers, None), (shape.window_layers, shape.window)):
        if layers:
            seconds = each * exact_pairs(setup.tokens, window)
            travelling = _ring(layer_of(shape, setup, window), setup, machine, seconds, backward)
            whole, bare = whole + layers * travelling[0], bare + layers * travelling[1]
    return whole, bare


def _ring(layer: Layer, setup: Setup, machine: Machine, seconds: float, backward: bool) -> tuple[float, float]:
    """The same for one layer whose pairs take a rank ``seconds`` on average."""
    if layer.ring == 1:
        return seconds, seconds
    hops = hops_of(layer.layout, layer.ring, layer.block, layer.window).kv
    if layer.layout == "contiguous" and layer.window is None:  # some rank's blocks are all seen whole
        seconds *= 2 * layer.ring / (layer.ring + 1)
    stage = seconds / (hops + 1)
    bandwidth, latency = ring_link(setup, machine)
    message, gradient = latency + layer.kv_bytes / bandwidth, layer.gradient_bytes / bandwidth
    if not backward:
        return hops * max(stage, message) + stage, seconds
    return hops * max(stage, message + latency + gradient) + stage + gradient, seconds


def all_to_all(shape: ModelShape, setup: Setup, machine: Machine, *, backward: bool = False) -> float:
    """Return the seconds of one pass's exchanges of one layer: q, k, v before attention, the result after it."""
    lean = setup.recompute == "layer_keep_attention"
    if setup.ulysses == 1:
        return 0.0
    bandwidth, latency = ulysses_link(setup, machine)
    sent = exchange_sent(layer_of(shape, setup), backward=backward, lean=lean).bytes
    return 2 * latency + sent / bandwidth + 2 * sent / (machine.bandwidth / 2)  # and the copies around them


def _zero(shape: ModelShape, setup: Setup, machine: Machine, compute: float, times: int) -> float:
    """Traffic that a step's computation does not cover; without overlap_comm the reduction of stages 0 to 2 stands."""
    if setup.world == 1:
        return 0.0
    wide, near = zero_sent(shape, setup)
    each = wide / world_link(setup, machine) + near / group_link(setup, machine)
    if setup.stage == 3:
        return times * max(each - 0.9 * compute, 0.0)
    return max(each - 0.3 * compute, 0.0) if setup.overlap_comm else each


def _checkpoints(shape: ModelShape, setup: Setup, machine: Machine) -> float:
    if not setup.offload_checkpoints or setup.recompute not in ("layer", "layer_keep_attention"):
        return 0.0
    moved = 2 * activations.checkpoint_kept(shape, setup)
    if setup.recompute_norms:
        moved += shape.itemsize * shape.hidden  # a layer's input, for its first norm
    return moved * shape.layers * setup.n / machine.host_link


def _optimizer(shape: ModelShape, setup: Setup, machine: Machine) -> float:
    """The update reads and writes the states once; on the host at its memory's speed, with weights going to and fro."""
    held = states.host_optimizer_bytes(shape, setup)
    if not setup.offload_optimizer:
        return 2.5 * held / machine.bandwidth
    own = states.share(shape.parameters, setup, 1)
    host_bandwidth = 200e9 / machine.per_node
    return 2.5 * held / host_bandwidth + own * (4 + shape.itemsize) / machine.host_link

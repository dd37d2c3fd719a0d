"""Predict the time of a step: compute at achieved rates, messages as latency + bytes / bandwidth (α-β model).

A stage of the ring takes the longer of its computation and its message. Ulysses' all-to-alls do not overlap. ZeRO's
traffic and offloaded checkpoints overlap with the step's computation as far as possible.
"""

from __future__ import annotations

from dataclasses import dataclass

from longctx.plan import activations, states
from longctx.plan.machines import Machine
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape
from longctx.plan.traffic import Layer, all_to_all_sent, hops_of
from longctx.plan.work import bounded_pairs, exact_pairs, flops_of, layer_of, zero_sent

ALL_TO_ALL = 0.85  # of point-to-point bandwidth
SMALL = 450  # tokens per block at which a fused kernel reaches half of its rate (H100, FlashAttention-3's chart)
TAIL = 0.02  # of a step: norms, rotary embeddings and kernel launches, which are not modelled
HIDDEN = 0.9  # of compute, which ZeRO-3's traffic and offloaded checkpoints can overlap with
HIDDEN_REDUCTION = 0.3  # of one micro-batch's compute, which the reduction of stages 0 to 2 can overlap with


@dataclass(frozen=True)
class Speed:
    """Predicted seconds of one optimizer step by activity, MFU, tokens/s and overlap."""

    seconds: dict[str, float]
    mfu: float
    tokens_per_second: float
    """of all ranks together"""
    overlap: Overlap

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Overlap:
    """Whether computation hides the ring's messages (docs/methods/ring.md "Overlap").

    `least_forward` and `least_backward` are the fewest tokens per rank: forward b (G/H) F/W, backward 2 ((b + 4)/5)
    (G/H) F/W, with b bytes per element, F the achieved FLOP/s of attention and W the bandwidth; half of it for
    contiguous shards; with U Ulysses members, a U-th.
    """

    tokens: int
    least_forward: float
    least_backward: float

    @property
    def hidden(self) -> bool:
        return self.tokens >= max(self.least_forward, self.least_backward)


def overlap_of(shape: ModelShape, setup: Setup, machine: Machine) -> Overlap:
    """Return this run's overlap condition."""
    if setup.ring == 1 or shape.full_layers + shape.window_layers == 0:
        return Overlap(setup.local, 0.0, 0.0)
    bandwidth, _ = ring_link(setup, machine)
    group, b = shape.kv_heads / shape.heads, shape.itemsize
    half = 1.0 if setup.layout != "contiguous" else 0.5
    forward = half * b * group * machine.peak * machine.attention / bandwidth
    backward = half * 2 * (b + 4) / 5 * group * machine.peak * machine.attention_backward / bandwidth
    return Overlap(setup.local, forward / setup.ulysses, backward / setup.ulysses)


def ring_link(setup: Setup, machine: Machine) -> tuple[float, float]:
    """Return (bandwidth, latency) of the ring's slowest hop. Ranks of one sequence are adjacent on nodes."""
    inside = setup.sequence <= machine.per_node
    return (machine.link, machine.latency) if inside else (machine.network, machine.network_latency)


def ulysses_link(setup: Setup, machine: Machine) -> tuple[float, float]:
    """Return (bandwidth, latency) of Ulysses' all-to-all."""
    inside = setup.ulysses <= machine.per_node
    found = (machine.link, machine.latency) if inside else (machine.network, machine.network_latency)
    return ALL_TO_ALL * found[0], found[1]


def world_link(setup: Setup, machine: Machine) -> float:
    """Return the bandwidth of a collective over all ranks. Across nodes it uses all network cards of a node."""
    return machine.link if setup.world <= machine.per_node else min(machine.link, machine.per_node * machine.network)


def group_link(setup: Setup, machine: Machine) -> float:
    """Return the bandwidth of a collective among the `zero.group` ranks that share a copy of the weights."""
    return machine.link if setup.group and setup.group <= machine.per_node else world_link(setup, machine)


def speed_of(shape: ModelShape, setup: Setup, machine: Machine) -> Speed:
    """Predict one optimizer step."""
    flops, times = flops_of(shape, setup), setup.accumulation
    # Compute of one micro-batch. `ring_pass` gives attention's time with messages, and without them (`bare`).
    products = (flops.products + flops.again_products) / (machine.peak * machine.matmul)
    passes = 1 + (setup.recompute == "layer")
    forward, forward_bare = ring_pass(shape, setup, machine, backward=False)
    backward, backward_bare = ring_pass(shape, setup, machine, backward=True)
    # All-to-alls do not overlap. Of ZeRO's traffic and of checkpoints only what compute does not hide is added.
    exchanges = [all_to_all(shape, setup, machine, backward=back) for back in (False, True)]
    exchange = exact_layers(shape) * (passes * exchanges[0] + exchanges[1])
    compute = products + passes * forward + backward
    seconds = {
        "matrix products": times * products,
        "attention": times * (passes * forward_bare + backward_bare),
        "ring, exposed": times * (passes * (forward - forward_bare) + backward - backward_bare),
        "all-to-all of heads": times * exchange,
        "ZeRO, exposed": _zero(shape, setup, machine, compute, times),
        "checkpoints, exposed": times * max(_checkpoints(shape, setup, machine) - HIDDEN * compute, 0.0),
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
    """Count the layers whose keys and values are sent: all but the bounded-state ones."""
    return shape.full_layers + shape.window_layers


def ring_pass(shape: ModelShape, setup: Setup, machine: Machine, *, backward: bool) -> tuple[float, float]:
    """Return the seconds of all layers' attention in one pass: (with messages, the busiest rank's without messages)."""
    block = setup.local * setup.ulysses
    rate = machine.peak * (machine.attention_backward if backward else machine.attention) * block / (block + SMALL)
    each = (10.0 if backward else 4.0) * shape.q_width * setup.rows / setup.sequence / rate  # seconds per visible pair
    whole = bare = each * shape.bounded_layers * bounded_pairs(shape, setup.tokens)
    for layers, window in ((shape.full_layers, None), (shape.window_layers, shape.window)):
        if layers:
            seconds = each * exact_pairs(setup.tokens, window)
            with_messages, busiest = _ring(layer_of(shape, setup, window), setup, machine, seconds, backward)
            whole, bare = whole + layers * with_messages, bare + layers * busiest
    return whole, bare


def _ring(layer: Layer, setup: Setup, machine: Machine, seconds: float, backward: bool) -> tuple[float, float]:
    """Return the same for one layer whose pairs take ``seconds`` per rank on average.

    With stage = seconds / (hops + 1), message = latency + kv_bytes / bandwidth, gradient = gradient_bytes / bandwidth:

        forward     hops · max(stage, message) + stage
        backward    hops · max(stage, message + latency + gradient) + stage + gradient
    """
    if layer.ring == 1:
        return seconds, seconds
    hops = hops_of(layer.layout, layer.ring, layer.block, layer.window).kv
    if layer.layout == "contiguous" and layer.window is None:  # the last rank's queries see all blocks
        seconds *= 2 * layer.ring / (layer.ring + 1)
    stage = seconds / (hops + 1)
    bandwidth, latency = ring_link(setup, machine)
    message, gradient = latency + layer.kv_bytes / bandwidth, layer.gradient_bytes / bandwidth
    if not backward:
        return hops * max(stage, message) + stage, seconds
    return hops * max(stage, message + latency + gradient) + stage + gradient, seconds


def all_to_all(shape: ModelShape, setup: Setup, machine: Machine, *, backward: bool = False) -> float:
    """Return the seconds of one layer's all-to-alls in one pass: q, k, v before attention, the output after it."""
    lean = setup.recompute == "layer_keep_attention"
    if setup.ulysses == 1:
        return 0.0
    bandwidth, latency = ulysses_link(setup, machine)
    sent = all_to_all_sent(layer_of(shape, setup), backward=backward, lean=lean).bytes
    return 2 * latency + sent / bandwidth + 2 * sent / (machine.bandwidth / 2)  # with the copies around them


def _zero(shape: ModelShape, setup: Setup, machine: Machine, compute: float, times: int) -> float:
    """Return the seconds of ZeRO's traffic that compute does not hide. Stages 0 to 2 overlap only with
    `overlap_comm`."""
    if setup.world == 1:
        return 0.0
    wide, near = zero_sent(shape, setup)
    each = wide / world_link(setup, machine) + near / group_link(setup, machine)
    if setup.stage == 3:
        return times * max(each - HIDDEN * compute, 0.0)
    return max(each - HIDDEN_REDUCTION * compute, 0.0) if setup.overlap_comm else each


def _checkpoints(shape: ModelShape, setup: Setup, machine: Machine) -> float:
    """Return the seconds of offloading and fetching one micro-batch's checkpoints."""
    if not setup.offload_checkpoints or setup.recompute not in ("layer", "layer_keep_attention"):
        return 0.0
    moved = 2 * activations.checkpoint_saved(shape, setup)
    if setup.recompute_norms:
        moved += shape.itemsize * shape.hidden  # the first norm fetches the layer's input again
    return moved * shape.layers * setup.n / machine.host_link


def _optimizer(shape: ModelShape, setup: Setup, machine: Machine) -> float:
    """Return the seconds of the update, which reads and writes the states once. An offloaded one runs at the host
    memory's bandwidth, with gradients copied to the host and weights back."""
    held = states.host_optimizer_bytes(shape, setup)
    if not setup.offload_optimizer:
        return 2.5 * held / machine.bandwidth
    own = states.share(shape.trainable, setup, 1)
    host_bandwidth = 200e9 / machine.per_node
    return 2.5 * held / host_bandwidth + own * (4 + shape.itemsize) / machine.host_link

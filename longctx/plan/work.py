"""Count what a rank computes and sends in one micro-batch: FLOPs and bytes of traffic.

Per rank and layer, with n local tokens, R ring members, U Ulysses members, G key heads of size D and b bytes per
element (docs/methods/ring.md "Traffic"; exact bytes in `traffic.py`):

    ring       forward (R - 1) blocks of 2 n G D b;  backward the same, and R blocks of dK/dV in fp32; fewer in windows
    Ulysses    forward (U - 1)/U of q, k, v and the output;  backward the same of their gradients
    ZeRO       stages 0 to 2: one all-reduce;  stage 3: gathers of weights, reduce-scatter of gradients
    bounded    states, to all later ranks or by a logarithmic scan; independent of n
"""

from __future__ import annotations

from dataclasses import dataclass

from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape
from longctx.plan.traffic import Layer, all_to_all_sent, ring_sent, scan_sent


@dataclass(frozen=True)
class Flops:
    """FLOPs of one micro-batch on one rank."""

    products: float
    """of matrix products with weights, forward and backward"""
    attention_forward: float
    attention_backward: float
    again_products: float
    """recomputed in backward"""
    again_attention: float

    @property
    def done(self) -> float:
        return self.useful + self.again_products + self.again_attention + self.attention_backward / 5

    @property
    def useful(self) -> float:
        """FLOPs that MFU counts: without recomputation, and 8 of the 10 that attention's backward takes per pair and
        element."""
        return self.products + self.attention_forward + self.attention_backward * 0.8


@dataclass(frozen=True)
class Wire:
    """Bytes that one rank sends in one micro-batch; for ZeRO 0 to 2 in one step, for ZeRO-3 on average over a step."""

    ring_forward: int
    ring_backward: int
    ulysses: int
    zero: int
    states: int

    @property
    def total(self) -> int:
        return self.ring_forward + self.ring_backward + self.ulysses + self.zero + self.states


def exact_pairs(length: int, window: int | None) -> float:
    """Count the visible (query, key) pairs of a causal row of one document, in one layer."""
    if window is None or window >= length:
        return length * (length + 1) / 2
    return window * (length - (window - 1) / 2)


def bounded_pairs(shape: ModelShape, length: int) -> float:
    """Return the compute of one bounded-state layer, in units of pairs."""
    return shape.slots * (1 + shape.kv_heads / shape.heads) * length


def pairs(shape: ModelShape, setup: Setup) -> float:
    """Count the visible (query, key) pairs of one rank over all layers, for causal rows of one document each."""
    length = setup.tokens
    total = shape.full_layers * exact_pairs(length, None) + shape.bounded_layers * bounded_pairs(shape, length)
    if shape.window_layers:
        total += shape.window_layers * exact_pairs(length, shape.window)
    return setup.rows * total / setup.sequence


def flops_of(shape: ModelShape, setup: Setup) -> Flops:
    """Count the FLOPs of one micro-batch per rank, averaged over ranks."""
    seen = pairs(shape, setup)
    forward = 4.0 * shape.q_width * seen
    layers = shape.layers * shape.attention_weights + shape.mlp_products
    policy = setup.recompute
    again = {"none": 0, "mlp": shape.mlp_products}.get(policy, layers)
    if policy == "none" and setup.mlp_tile is not None:
        again = shape.mlp_products
    return Flops(
        products=6.0 * shape.matrix_weights * setup.n,
        attention_forward=forward,
        attention_backward=2.5 * forward,
        again_products=2.0 * again * setup.n,
        again_attention=forward if policy == "layer" else 0.0,
    )


def layer_of(shape: ModelShape, setup: Setup, window: int | None = None) -> Layer:
    """Return one layer's attention as `traffic` counts it, with document ids as in training."""
    return Layer(
        setup.tokens, shape.heads, shape.kv_heads, shape.head_dim, setup.ring, setup.ulysses, setup.layout,
        shape.itemsize, window=window, documents=True, rows=setup.rows,
    )  # fmt: skip


def state_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of one chunk's state in one bounded-state layer: keys, values and mass of each slot, in fp32."""
    return 4 * setup.rows * shape.kv_heads * shape.slots * (2 * shape.head_dim + 1)


def wire_of(shape: ModelShape, setup: Setup) -> Wire:
    """Count what one rank sends in one micro-batch: the busiest rank, where ranks differ."""
    passes = 2 if setup.recompute == "layer" else 1  # recomputed attention repeats its hops and all-to-alls
    lean = setup.recompute == "layer_keep_attention"
    forward = backward = heads = 0
    for layers, window in ((shape.full_layers, None), (shape.window_layers, shape.window)):
        layer = layer_of(shape, setup, window)
        forward += layers * passes * ring_sent(layer, backward=False).bytes
        backward += layers * ring_sent(layer, backward=True).bytes
        heads += layers * passes * all_to_all_sent(layer, backward=False).bytes
        heads += layers * all_to_all_sent(layer, backward=True, lean=lean).bytes
    states = 0
    if shape.bounded_layers and setup.sequence > 1:
        own, ids = state_bytes(shape, setup), 8 * setup.rows  # a state's document id is sent in forward only
        forth = scan_sent(setup.layout, setup.sequence, own + ids, backward=False).bytes
        back = scan_sent(setup.layout, setup.sequence, own, backward=True).bytes
        states = shape.bounded_layers * (passes * forth + back)
    return Wire(forward, backward, heads, zero_bytes(shape, setup), states)


def zero_bytes(shape: ModelShape, setup: Setup) -> int:
    """Count what one rank sends for ZeRO, over all links."""
    return sum(zero_sent(shape, setup))


def zero_sent(shape: ModelShape, setup: Setup) -> tuple[int, int]:
    """Return the bytes that one rank sends for ZeRO: (among all ranks, within its `zero.group`).

    With N parameters, P ranks, g bytes per gradient element (4 if ranks share a sequence, else b) and b per weight:

        stages 0 to 2    (2 g + b) N (P - 1) / P    all-reduce of gradients, gather of weights (not in stage 0)
        stage 3          (2 b + g) N (P - 1) / P    gathers in forward and backward, reduce-scatter

    N counts trained parameters for gradients, and for weights below stage 3. A model that may stay gathered is gathered
    once. With `zero.group`, all gathers of a step except the first stay within the group; the result is the average per
    micro-batch.
    """
    others = (setup.world - 1) / setup.world
    gradient = 4 if setup.sequence > 1 else shape.itemsize
    if setup.stage == 3:
        gathers: float = 1 if shape.parameters <= setup.live else 2
        near = 0.0 if setup.group is None else gathers - 1 / setup.accumulation
        here = 0.0 if setup.group is None else (setup.group - 1) / setup.group
        wide = (gathers - near) * shape.itemsize * shape.parameters + gradient * shape.trainable
        return int(wide * others), int(near * shape.itemsize * shape.parameters * here)
    gathered = shape.itemsize if setup.stage else 0
    return int((2 * gradient + gathered) * shape.trainable * others), 0

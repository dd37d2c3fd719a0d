"""What a rank computes and sends in one micro-batch: FLOPs, and bytes on the wire, by their formulas.

Per rank and layer, with n local tokens, R ring members, U Ulysses members and b bytes a number (methods.md 4.3):

    ring      forward (R - 1) blocks of 2 n G D b;  backward the same, and R blocks of dK/dV in fp32
    Ulysses   (U - 1)/U of q, k, v and the result there, of their gradients back
    ZeRO-3    weights gathered in forward and backward, gradients reduced and scattered; ZeRO 0 to 2: one all-reduce
    memories  one all-gather of states each way, whatever the length
"""

from __future__ import annotations

from dataclasses import dataclass

from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape


@dataclass(frozen=True)
class Flops:
    """Of one micro-batch on one rank."""

    products: float
    """with weights, forward and backward"""
    attention_forward: float
    attention_backward: float
    again_products: float
    """recomputed"""
    again_attention: float

    @property
    def done(self) -> float:
        return self.useful + self.again_products + self.again_attention + self.attention_backward / 5

    @property
    def useful(self) -> float:
        """What MFU counts: no recomputation, and 8 of the 10 FLOPs that a backward of attention takes a pair."""
        return self.products + self.attention_forward + self.attention_backward * 0.8


@dataclass(frozen=True)
class Wire:
    """Bytes that one rank sends in one micro-batch (ZeRO 0 to 2: in one step)."""

    ring_forward: int
    ring_backward: int
    ulysses: int
    zero: int
    states: int

    @property
    def total(self) -> int:
        return self.ring_forward + self.ring_backward + self.ulysses + self.zero + self.states


def pairs(shape: ModelShape, setup: Setup) -> float:
    """Visible (query, key) pairs of one rank in a causal row without documents, over all layers that attend exactly."""
    length = setup.tokens
    full = length * (length + 1) / 2
    window = full
    if shape.window is not None and shape.window < length:
        window = shape.window * (length - (shape.window - 1) / 2)
    memory = shape.slots * (1 + shape.kv_heads / shape.heads) * length
    total = shape.full_layers * full + shape.window_layers * window + shape.memory_layers * memory
    return setup.rows * total / setup.sequence


def flops_of(shape: ModelShape, setup: Setup) -> Flops:
    """Count one micro-batch on one rank, on average over ranks."""
    seen = pairs(shape, setup)
    forward = 4.0 * shape.q_width * seen
    layer = shape.attention_weights + shape.mlp_weights
    policy = setup.recompute
    again = {"none": 0, "mlp": shape.mlp_weights}.get(policy, layer)
    if policy == "none" and setup.mlp_tile is not None and setup.n > setup.mlp_tile:
        again = shape.mlp_weights
    return Flops(
        products=6.0 * shape.matrix_weights * setup.n,
        attention_forward=forward,
        attention_backward=2.5 * forward,
        again_products=2.0 * again * shape.layers * setup.n,
        again_attention=forward if policy == "layer" else 0.0,
    )


def kv_rank_width(shape: ModelShape, setup: Setup) -> float:
    """Numbers of keys a local token accounts for on the ring: with more Ulysses members than key heads, heads are
    repeated."""
    return shape.kv_width if setup.ulysses <= shape.kv_heads else setup.ulysses * shape.head_dim


def kv_message(shape: ModelShape, setup: Setup) -> int:
    """Bytes of one block of keys and values (without document ids)."""
    return int(2 * setup.n * kv_rank_width(shape, setup) * shape.itemsize)


def gradient_message(shape: ModelShape, setup: Setup) -> int:
    """Bytes of one block of dK and dV, in fp32."""
    return int(2 * setup.n * kv_rank_width(shape, setup) * 4)


def ulysses_message(shape: ModelShape, setup: Setup) -> int:
    """Bytes that a rank sends in one direction of one pass: q, k, v there and the result back."""
    width = shape.q_width + kv_rank_width(shape, setup)
    return int(2 * setup.n * width * shape.itemsize * (setup.ulysses - 1) / setup.ulysses)


def wire_of(shape: ModelShape, setup: Setup) -> Wire:
    """Count what one rank sends in one micro-batch."""
    exact, hops = shape.full_layers + shape.window_layers, setup.ring - 1
    passes = 2 if setup.recompute == "layer" else 1  # a recomputed attention goes round again
    block, gradient = kv_message(shape, setup), gradient_message(shape, setup)
    state = 4 * shape.kv_heads * shape.slots * 2 * shape.head_dim * setup.rows
    return Wire(
        ring_forward=passes * exact * hops * block,
        ring_backward=exact * (hops * block + setup.ring * gradient) if hops else 0,
        ulysses=(1 + passes) * exact * ulysses_message(shape, setup),
        zero=zero_bytes(shape, setup),
        states=2 * shape.memory_layers * state * (setup.sequence > 1),
    )


def zero_bytes(shape: ModelShape, setup: Setup) -> int:
    """Weights gathered and gradients reduced by one rank; gradients in fp32 where ranks share a sequence."""
    others = (setup.world - 1) / setup.world
    gradient = 4 if setup.sequence > 1 else shape.itemsize
    if setup.stage == 3:
        return int((2 * shape.itemsize + gradient) * shape.parameters * others)
    if setup.stage == 0:
        return int(2 * gradient * shape.parameters * others)
    return int((gradient + shape.itemsize) * shape.parameters * others)

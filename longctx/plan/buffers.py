"""Bytes of the buffers of one moment: attention's accumulators, blocks on the ring, one tile of an MLP or of logits."""

from __future__ import annotations

from longctx.plan.activations import mlp_backward, mlp_inner, tiled_mlp
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape


def attention_forward(shape: ModelShape, setup: Setup) -> int:
    """The fp32 accumulator of the result, lse, and q and k before and after their rotation."""
    rotation = 2 * shape.itemsize * shape.q_width
    return setup.n * (4 * shape.q_width + 4 * shape.heads + rotation)


def attention_backward(shape: ModelShape, setup: Setup) -> int:
    """dout by token, dq in fp32 and in the run's dtype, lse as the operator wants it, delta.

    dq is rounded after the ring's last stage, in the room of buffers that are gone by then; torch's operator on a CPU
    makes a rounded one at every stage.
    """
    copy = shape.itemsize * shape.q_width * setup.n if shape.itemsize < 4 else 0
    if setup.on_gpu:
        copy = max(0, copy - ring_backward(shape, setup) + 2 * 4 * shape.kv_width * setup.n)
    return setup.n * (shape.q_width * (shape.itemsize + 4) + 2 * 4 * shape.heads) + copy


def ring_forward(shape: ModelShape, setup: Setup) -> int:
    """The block of keys and values that is here and the one on its way."""
    return 2 * kv_block(shape, setup) if setup.ring > 2 else kv_block(shape, setup) if setup.ring == 2 else 0


def ring_backward(shape: ModelShape, setup: Setup) -> int:
    """The same, and dK/dV in fp32: of this stage, of the previous one under way, and arriving."""
    gradients = 1 if setup.ring == 1 else 3
    return ring_forward(shape, setup) + gradients * 2 * 4 * shape.kv_width * setup.n


def kv_block(shape: ModelShape, setup: Setup) -> int:
    """Keys and values of one rank's tokens, as they travel."""
    return 2 * shape.itemsize * shape.kv_width * setup.n


def ulysses_buffers(shape: ModelShape, setup: Setup) -> int:
    """Heads exchanged for tokens: q, k, v and the result, sent and received."""
    if setup.ulysses == 1:
        return 0
    kv = max(shape.kv_width, setup.ulysses * shape.head_dim)
    return 2 * shape.itemsize * (2 * shape.q_width + 2 * kv) * setup.n


def mlp_tile_bytes(shape: ModelShape, setup: Setup) -> int:
    """An MLP's inner results and their gradients in backward, for one tile (or for all tokens). Recomputed, those of a
    gated MLP take each other's places (`nn/gated.py`)."""
    tokens = setup.n if setup.mlp_tile is None else min(setup.mlp_tile, setup.n)
    written_out = tiled_mlp(setup) or setup.recompute == "mlp"
    if written_out and shape.gated:
        return tokens * mlp_inner(shape)
    return tokens * (mlp_backward(shape) + (mlp_inner(shape) if written_out or setup.recompute != "none" else 0))


def mlp_gradient_bytes(shape: ModelShape, setup: Setup) -> int:
    """The gradients of an MLP's weights beside their fp32 sum over tiles."""
    if setup.recompute != "mlp" and not tiled_mlp(setup):
        return shape.itemsize * shape.largest_mlp_weight
    return (4 + shape.itemsize) * shape.mlp_weights


def loss_tile_bytes(shape: ModelShape, setup: Setup) -> int:
    """Logits. Tiled: in fp32, and in the run's dtype while one becomes the other. Else three times all of them:
    logarithms of the probabilities, gradients before and after, in fp32."""
    if setup.loss_tile is None:
        return 3 * 4 * setup.n * shape.vocab
    width = 4 if shape.itemsize == 4 else 4 + shape.itemsize
    return min(setup.loss_tile, setup.n) * shape.vocab * width


def loss_gradient_bytes(shape: ModelShape, setup: Setup) -> int:
    """The gradient of the hidden states and, tiled, the head's in fp32: made in forward, kept until backward."""
    head = 0 if setup.untiled_loss else 4 * shape.embedding
    return shape.itemsize * shape.hidden * setup.n + head

"""Bytes of temporary buffers: attention's accumulators, blocks on the ring, one tile of an MLP or of the logits."""

from __future__ import annotations

from longctx.plan.activations import mlp_backward, mlp_intermediates, tiled_mlp
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape


def attention_backward(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of dout by token, dq in fp32 and in the run's dtype, lse in the operator's layout, and delta.

    On a GPU, dq is rounded to the run's dtype after the ring's last stage, when the ring's buffers are free again;
    torch's CPU operator rounds it at every stage.
    """
    rounded = shape.itemsize * shape.q_width * setup.n if shape.itemsize < 4 else 0
    if setup.on_gpu:
        rounded = max(0, rounded - ring_backward(shape, setup) + 2 * 4 * shape.kv_width * setup.n)
    return setup.n * (shape.q_width * (shape.itemsize + 4) + 2 * 4 * shape.heads) + rounded


def ring_forward(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of the key/value blocks besides the rank's own: the one in use and, from 3 ranks on, the one
    being received."""
    return 2 * kv_block(shape, setup) if setup.ring > 2 else kv_block(shape, setup) if setup.ring == 2 else 0


def ring_backward(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of `ring_forward` and of dK/dV in fp32: this stage's, the one being sent, the one being
    received."""
    gradients = 1 if setup.ring == 1 else 3
    return ring_forward(shape, setup) + gradients * 2 * 4 * shape.kv_width * setup.n


def kv_block(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of the keys and values of one rank's tokens, as they are sent."""
    return 2 * shape.itemsize * shape.kv_width * setup.n


def ulysses_buffers(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of Ulysses' all-to-all: q, k, v and the output, sent and received."""
    if setup.ulysses == 1:
        return 0
    kv = max(shape.kv_width, setup.ulysses * shape.head_dim)
    return 2 * shape.itemsize * (2 * shape.q_width + 2 * kv) * setup.n


def mlp_tile_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of an MLP's intermediates and their gradients in backward, for one tile or for all tokens.

    A gated MLP that recomputes writes the gradients over the intermediates (`nn/gated.py`).
    """
    tokens = setup.n if setup.mlp_tile is None else min(setup.mlp_tile, setup.n)
    recomputes = tiled_mlp(setup) or setup.recompute == "mlp"
    if recomputes and shape.gated:
        return tokens * mlp_intermediates(shape)
    # With `recompute: none` the intermediates are among the saved activations already.
    inner = mlp_intermediates(shape) if recomputes or setup.recompute != "none" else 0
    return tokens * (mlp_backward(shape) + inner)


def mlp_gradient_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of the MLP's weight gradients that are not yet added up: the largest one; if the MLP recomputes,
    all of them, with their fp32 sum over tiles."""
    if setup.recompute != "mlp" and not tiled_mlp(setup):
        return shape.itemsize * shape.largest_mlp_weight
    return (4 + shape.itemsize) * shape.mlp_weights


def loss_tile_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of the logits and their gradients.

    Tiled: one tile in fp32, and in the run's dtype during the conversion. Untiled: three fp32 tensors of all logits
    (log-probabilities, and the gradients before and after log-softmax).
    """
    if setup.loss_tile is None:
        return 3 * 4 * setup.n * shape.vocab
    width = 4 if shape.itemsize == 4 else 4 + shape.itemsize
    return min(setup.loss_tile, setup.n) * shape.vocab * width


def loss_gradient_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of the gradients that the loss computes in forward and keeps for backward: of the hidden states
    and, if tiled, of the head in fp32."""
    head = 0 if setup.loss_tile is None else 4 * shape.embedding
    return shape.itemsize * shape.hidden * setup.n + head

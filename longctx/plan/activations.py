"""Bytes of one layer's results, per token: what autograd keeps of it, and what backward makes on the way.

Llama's shape: a norm keeps its input and its result (by `memory.recompute_norms` less, else more); attention keeps
q, k, v, its result (twice: by head and by token) and lse; a gated MLP its gate, activation, up projection and product.
b is the bytes of a number in the run's dtype.
"""

from __future__ import annotations

from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape


def norm_kept(shape: ModelShape, setup: Setup, *, made_anew: bool = False) -> int:
    """One RMSNorm: its input and its result, which may be made anew for those who come next; left to autograd, the
    input in fp32 (in an fp32 run the residual stream itself), the normalised input, the result and 1/rms."""
    if setup.recompute_norms:
        return (1 if made_anew else 2) * shape.itemsize * shape.hidden
    return shape.hidden * (4 + 2 * shape.itemsize) + 4


def norm_backward(shape: ModelShape) -> int:
    """What the backward of an RMSNorm left to autograd has at once, beside the input in fp32: five fp32 tensors."""
    return 20 * shape.hidden


def norms_kept(shape: ModelShape, setup: Setup) -> tuple[int, int]:
    """The norms before attention and before the MLP. Projections have the result made anew, and MLPs that recompute."""
    return norm_kept(shape, setup, made_anew=True), norm_kept(shape, setup, made_anew=recomputed_mlp(setup))


def attention_result(shape: ModelShape) -> int:
    """Attention's result and lse: what `layer_keep_attention` saves from being computed again."""
    return shape.itemsize * shape.q_width + 4 * shape.heads


def attention_kept(shape: ModelShape) -> int:
    """q, k, v; the result by head with lse; and by token, which the output projection keeps."""
    return shape.itemsize * (2 * shape.q_width + 2 * shape.kv_width) + attention_result(shape)


def mlp_inner(shape: ModelShape) -> int:
    """Widths of inner results that an MLP keeps: gate, activation, up, product; GELU written out keeps five."""
    return shape.itemsize * shape.inner * (4 if shape.gated else 5)


def mlp_backward(shape: ModelShape) -> int:
    """And what its backward adds at its peak: gradients of two factors of the product."""
    return shape.itemsize * shape.inner * 2


def checkpoint_kept(shape: ModelShape, setup: Setup) -> int:
    """Per token and layer: a layer's input and, by `layer_keep_attention`, its attention's result."""
    own = shape.itemsize * shape.hidden
    return own + attention_result(shape) if setup.recompute == "layer_keep_attention" else own


def layer_kept(shape: ModelShape, setup: Setup) -> int:
    """Per token and layer between forward and backward, by the policy of `memory.recompute`."""
    if setup.recompute in ("layer", "layer_keep_attention"):
        return 0 if setup.offload_checkpoints else checkpoint_kept(shape, setup)
    kept = sum(norms_kept(shape, setup)) + attention_kept(shape)
    return kept if recomputed_mlp(setup) else kept + mlp_inner(shape)


def fetched(shape: ModelShape, setup: Setup, *, attended: bool = False) -> int:
    """Per token: offloaded checkpoints on the device while a layer's backward runs (`models/activations/host.py`).

    Until ``attended``, when its attention has its gradients, its own; without its input, if its norms are recomputed
    and get that once more. Then both, and those of the next layer.
    """
    if not setup.offload_checkpoints or setup.recompute not in ("layer", "layer_keep_attention"):
        return 0
    kept = checkpoint_kept(shape, setup)
    if attended:
        return min(2, shape.layers) * kept
    return kept - shape.itemsize * shape.hidden if setup.recompute_norms else kept


def tiled_mlp(setup: Setup) -> bool:
    """Whether MLPs go through the tokens in tiles (rows no longer than a tile are one tile)."""
    return setup.mlp_tile is not None


def recomputed_mlp(setup: Setup) -> bool:
    """Whether an MLP keeps nothing but its input."""
    return setup.recompute == "mlp" or tiled_mlp(setup)


def rotary_kept(shape: ModelShape) -> int:
    """cos and sin, shared by all layers."""
    return 2 * shape.itemsize * shape.head_dim


def inputs_kept() -> int:
    """Token ids, positions, two kinds of labels (int64) and document ids (int32)."""
    return 4 * 8 + 4

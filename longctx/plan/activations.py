"""Bytes per token of one layer: the activations that forward saves for backward, and the temporaries of backward.

For a layer like Llama's: a norm saves its input and its output (less with `memory.recompute_norms`, more under
autograd); attention saves q, k, v, its output (by head for attention, by token for the output projection) and lse; a
gated MLP saves its gate, activation, up projection and product.
"""

from __future__ import annotations

from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape


def norm_saved(shape: ModelShape, setup: Setup, *, recomputed: bool = False) -> int:
    """Return what one RMSNorm saves: its input and its output, without the output if the next module recomputes it.

    Under autograd: the input in fp32 (in an fp32 run, the residual stream itself), the normalised input, the output,
    1/rms.
    """
    if setup.recompute_norms:
        return (1 if recomputed else 2) * shape.itemsize * shape.hidden
    return shape.hidden * (4 + 2 * shape.itemsize) + 4


def norm_backward(shape: ModelShape) -> int:
    """Return what autograd's backward of an RMSNorm holds besides the fp32 input: five fp32 tensors."""
    return 20 * shape.hidden


def norms_saved(shape: ModelShape, setup: Setup) -> tuple[int, int]:
    """Return what the norms before attention and before the MLP save. Projections, and MLPs that recompute, recompute
    the norm's output too."""
    return norm_saved(shape, setup, recomputed=True), norm_saved(shape, setup, recomputed=recomputed_mlp(setup))


def attention_output(shape: ModelShape) -> int:
    """Return the bytes of attention's output and lse, which `layer_keep_attention` saves instead of recomputing."""
    return shape.itemsize * shape.q_width + 4 * shape.heads


def attention_saved(shape: ModelShape) -> int:
    """Return what attention saves: q, k, v, output and lse by head, and the output by token for the projection."""
    return shape.itemsize * (2 * shape.q_width + 2 * shape.kv_width) + attention_output(shape)


def mlp_intermediates(shape: ModelShape) -> int:
    """Return what an MLP saves: gate, activation, up and product; five tensors where GELU is written out."""
    return shape.itemsize * shape.inner * (4 if shape.gated else 5)


def mlp_backward(shape: ModelShape) -> int:
    """Return what an MLP's backward adds at its peak: the gradients of the product's two factors."""
    return shape.itemsize * shape.inner * 2


def checkpoint_saved(shape: ModelShape, setup: Setup) -> int:
    """Return the checkpoint of one layer: its input and, with `layer_keep_attention`, attention's output."""
    own = shape.itemsize * shape.hidden
    return own + attention_output(shape) if setup.recompute == "layer_keep_attention" else own


def layer_saved(shape: ModelShape, setup: Setup) -> int:
    """Return what one layer saves from forward to backward on the device, as `memory.recompute` decides."""
    if setup.recompute in ("layer", "layer_keep_attention"):
        return 0 if setup.offload_checkpoints else checkpoint_saved(shape, setup)
    saved = sum(norms_saved(shape, setup)) + attention_saved(shape)
    return saved if recomputed_mlp(setup) else saved + mlp_intermediates(shape)


def checkpoint_fetched(shape: ModelShape, setup: Setup, *, attended: bool = False) -> int:
    """Return the offloaded checkpoints on the device during a layer's backward (`models/activations/host.py`).

    Until the layer's attention has its gradients: this layer's checkpoint, without the layer's input if norms are
    recomputed, since they fetch the input again. Afterwards (``attended``): this layer's and the next one's.
    """
    if not setup.offload_checkpoints or setup.recompute not in ("layer", "layer_keep_attention"):
        return 0
    saved = checkpoint_saved(shape, setup)
    if attended:
        return min(2, shape.layers) * saved
    return saved - shape.itemsize * shape.hidden if setup.recompute_norms else saved


def tiled_mlp(setup: Setup) -> bool:
    """Return whether MLPs process the tokens in tiles. Rows no longer than a tile are one tile."""
    return setup.mlp_tile is not None


def recomputed_mlp(setup: Setup) -> bool:
    """Return whether an MLP saves only its input."""
    return setup.recompute == "mlp" or tiled_mlp(setup)


def rotary_saved(shape: ModelShape) -> int:
    """Return the bytes of cos and sin, which all layers share."""
    return 2 * shape.itemsize * shape.head_dim


def input_bytes() -> int:
    """Return the bytes of token ids, positions, two kinds of labels (int64) and document ids (int32)."""
    return 4 * 8 + 4

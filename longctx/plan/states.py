"""Bytes of weights, gradients and optimizer states on one rank, under each ZeRO stage. They do not grow with tokens.

Over P ranks, stage 1 shards the fp32 master weights and optimizer states, stage 2 also the gradients, stage 3 also the
weights. DeepSpeed (0.19) keeps fp32 master weights on stages 1 to 3 even if the weights are fp32 already.
"""

from __future__ import annotations

from longctx.config.nvme import SUB_GROUP
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape


def share(number: int, setup: Setup, from_stage: int) -> int:
    """Return one rank's part of ``number`` elements, which ZeRO shards from stage ``from_stage`` on."""
    return -(-number // setup.world) if setup.stage >= from_stage else number


def weight_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of the weights that forward and backward use, as stored between uses."""
    if setup.offload_parameters and setup.stage == 3:
        return 0
    return shape.itemsize * share(shape.parameters, setup, 3) + copy_bytes(shape, setup)


def copy_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of the secondary shards (hpZ): a copy of the weights sharded over `zero.group` ranks, written in
    the first forward after each update."""
    return 0 if setup.group is None or setup.stage < 3 else shape.itemsize * -(-shape.parameters // setup.group)


def optimizer_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of the optimizer states and the fp32 master weights on the device."""
    return 0 if setup.offload_optimizer and setup.on_gpu else host_optimizer_bytes(shape, setup)


def host_optimizer_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of the optimizer states and the fp32 master weights, on the device or on the host.

    An optimizer on NVMe leaves in host memory: summed gradients, and four buffers of the elements swapped in at once.
    """
    if setup.swap_optimizer:
        own = share(shape.trainable, setup, 1)
        return 4 * own + 16 * min(own, SUB_GROUP)
    master = 0 if setup.stage == 0 and shape.itemsize == 4 else 4
    gradients = 8 if setup.offload_optimizer else 0  # a pinned buffer, and the sum over micro-batches
    return (master + gradients + 4 * setup.states) * share(shape.trainable, setup, 1)


def swapped_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes on NVMe: master weights, gradients and optimizer states."""
    return (8 + 4 * setup.states) * share(shape.trainable, setup, 1) if setup.swap_optimizer else 0


def resident_gradient_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of gradient buffers that are held throughout: ZeRO-3's flat buffer of this rank's shards;
    without ZeRO, the fp32 gradients of bf16 weights."""
    if setup.stage == 3:
        return 0 if setup.offload_optimizer and setup.on_gpu else shape.itemsize * share(shape.trainable, setup, 3)
    if setup.stage == 0 and shape.itemsize == 2:
        return 4 * shape.trainable
    return 0


def computed_gradient_bytes(shape: ModelShape, setup: Setup, computed: int) -> int:
    """Return the bytes of the gradients that backward has computed so far, of ``computed`` parameters.

    ZeRO-2 keeps a gradient whole on every rank that owns a part of it: all ranks that share the head hold its gradient.
    """
    if setup.stage == 3 or (setup.offload_optimizer and setup.stage == 2):
        return 0
    computed = computed * shape.trainable // shape.parameters
    if setup.stage == 2:
        largest = max(shape.largest_mlp_weight, 0 if shape.tied else shape.embedding)
        return shape.itemsize * max(share(computed, setup, 2), min(computed, largest))
    return shape.itemsize * computed


def bucket_bytes(shape: ModelShape, setup: Setup, computed: int = 1) -> int:
    """Return the bytes of the buckets in which gradients are collected for a reduction, in fp32 if ranks share a
    sequence.

    Stage 3 holds one throughout; stages 1 and 2 hold one in backward, or two with `overlap_comm`.
    """
    if setup.stage == 0 or (setup.stage < 3 and not computed):
        return 0
    copies = 2 if setup.overlap_comm and setup.stage < 3 else 1
    return copies * setup.bucket * (4 if setup.sequence > 1 else shape.itemsize)


def large_gradient_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of the copy through which stages 1 and 2 reduce an embedding's gradient larger than a bucket."""
    trained = min(shape.embedding, shape.trainable)
    return 4 * trained if trained > setup.bucket else 0


def offload_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of two fp32 copies of the largest parameter, with which stages 1 and 2 offload gradients."""
    return 8 * _largest(shape) if setup.offload_optimizer and setup.stage < 3 else 0


def update_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes that the optimizer step allocates: fp32 gradients for the master weights, and temporaries."""
    if setup.stage == 0:
        return 8 * _largest(shape)
    own = share(shape.trainable, setup, 1)
    temporaries = 8 * own if setup.states == 2 else 0
    if setup.offload_optimizer:
        return 0 if setup.on_gpu else temporaries
    return 4 * own + temporaries


def _largest(shape: ModelShape) -> int:
    """Count the elements of the largest parameter that is trained."""
    return min(max(shape.embedding, shape.largest_mlp_weight), shape.trainable)


def persistent_elements(shape: ModelShape, setup: Setup) -> int:
    """Count the elements of parameters too small to be sharded (`stage3_param_persistence_threshold`)."""
    attention = [shape.hidden * shape.q_width] * 2 + [shape.hidden * shape.kv_width] * 2
    mlp = [shape.largest_mlp_weight] * (3 if shape.gated else 2)
    small = sum(size for size in (*attention, *mlp, shape.hidden, shape.hidden) if size <= setup.persistent)
    return shape.layers * small + shape.hidden


def resting_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of whole parameters between steps: the small ones under ZeRO-3."""
    return shape.itemsize * persistent_elements(shape, setup) if setup.stage == 3 else 0


def gathered_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the most bytes of gathered parameters at once.

    DeepSpeed releases a parameter after use only if what is gathered exceeds `stage3_max_live_parameters` or its next
    use is further than `stage3_max_reuse_distance` away (both 1e9 elements by default): a small model stays gathered.
    """
    if setup.stage < 3:
        return 0
    at_least = max(shape.layer_weights, shape.embedding) + min(setup.prefetch, shape.parameters)
    return shape.itemsize * min(shape.parameters, max(setup.live, at_least))

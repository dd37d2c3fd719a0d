"""Bytes of weights, gradients and optimizer states on one rank, under each ZeRO stage: what does not grow with tokens.

With N parameters, P ranks and b bytes a number (DeepSpeed 0.19): stage 0 holds all of everything; 1 cuts the fp32
master weights and optimizer states into P parts; 2 the gradients; 3 the weights. DeepSpeed keeps a master copy in fp32
beside the weights on stages 1 to 3 even where the weights are fp32 already.
"""

from __future__ import annotations

from longctx.config.nvme import SUB_GROUP
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape


def share(number: int, setup: Setup, from_stage: int) -> int:
    """``number`` divided over all ranks if the stage cuts it."""
    return -(-number // setup.world) if setup.stage >= from_stage else number


def weight_bytes(shape: ModelShape, setup: Setup) -> int:
    """The weights that forward and backward compute with, as they are stored between uses."""
    if setup.offload_parameters and setup.stage == 3:
        return 0
    return shape.itemsize * share(shape.parameters, setup, 3) + copy_bytes(shape, setup)


def copy_bytes(shape: ModelShape, setup: Setup) -> int:
    """The weights once more, cut over the ranks of a node (hpZ); made in the first forward after each update."""
    return 0 if setup.group is None or setup.stage < 3 else shape.itemsize * -(-shape.parameters // setup.group)


def optimizer_bytes(shape: ModelShape, setup: Setup) -> int:
    """AdamW's two moments (or what the optimizer has) and the fp32 master weights, on the device."""
    return 0 if setup.offload_optimizer and setup.on_gpu else host_optimizer_bytes(shape, setup)


def host_optimizer_bytes(shape: ModelShape, setup: Setup) -> int:
    """The same, wherever they are; of an optimizer on NVMe what stays in memory: gradients, as they are summed, and
    four buffers of the numbers that are swapped in at once."""
    if setup.swap_optimizer:
        own = share(shape.parameters, setup, 1)
        return 4 * own + 16 * min(own, SUB_GROUP)
    master = 0 if setup.stage == 0 and shape.itemsize == 4 else 4
    gradients = 8 if setup.offload_optimizer else 0  # pinned, and summed over micro-batches
    return (master + gradients + 4 * setup.states) * share(shape.parameters, setup, 1)


def swapped_bytes(shape: ModelShape, setup: Setup) -> int:
    """What is on NVMe: master weights, gradients and the optimizer's states."""
    return (8 + 4 * setup.states) * share(shape.parameters, setup, 1) if setup.swap_optimizer else 0


def resident_gradient_bytes(shape: ModelShape, setup: Setup) -> int:
    """Held all the time: ZeRO-3 has one flat buffer for this rank's gradients; bf16 without ZeRO an fp32 one."""
    if setup.stage == 3:
        return 0 if setup.offload_optimizer and setup.on_gpu else shape.itemsize * share(shape.parameters, setup, 3)
    if setup.stage == 0 and shape.itemsize == 2:
        return 4 * shape.parameters
    return 0


def made_gradient_bytes(shape: ModelShape, setup: Setup, made: int) -> int:
    """Made in backward so far, for ``made`` of the model's parameters; until the optimizer step.

    ZeRO-2 keeps a gradient whole if any of it is this rank's: of a head that many ranks share, each of them has all.
    """
    if setup.stage == 3 or (setup.offload_optimizer and setup.stage == 2):
        return 0
    if setup.stage == 2:
        largest = max(shape.largest_mlp_weight, 0 if shape.tied else shape.embedding)
        return shape.itemsize * max(share(made, setup, 2), min(made, largest))
    return shape.itemsize * made


def bucket_bytes(shape: ModelShape, setup: Setup, made: int = 1) -> int:
    """The buffers in which gradients are gathered before they are reduced: ZeRO-3's are there all the time, those of
    stages 1 and 2 in backward (two where reducing overlaps). fp32 wherever ranks share a sequence."""
    if setup.stage == 0 or (setup.stage < 3 and not made):
        return 0
    copies = 2 if setup.overlap_comm and setup.stage < 3 else 1
    return copies * setup.bucket * (4 if setup.sequence > 1 else shape.itemsize)


def large_gradient_bytes(shape: ModelShape, setup: Setup) -> int:
    """Stages 1 and 2 reduce a gradient that is larger than a bucket, as the embedding's, through a copy of its own."""
    return 4 * shape.embedding if shape.embedding > setup.bucket else 0


def offload_bytes(shape: ModelShape, setup: Setup) -> int:
    """Two fp32 copies of the largest parameter, through which stages 1 and 2 carry gradients to the host."""
    return 8 * max(shape.embedding, shape.largest_mlp_weight) if setup.offload_optimizer and setup.stage < 3 else 0


def update_bytes(shape: ModelShape, setup: Setup) -> int:
    """What the optimizer step makes: gradients in fp32 for the master weights, and the update's own temporaries."""
    if setup.stage == 0:
        return 8 * max(shape.embedding, shape.largest_mlp_weight)
    own = share(shape.parameters, setup, 1)
    temporaries = 8 * own if setup.states == 2 else 0
    if setup.offload_optimizer:
        return 0 if setup.on_gpu else temporaries
    return 4 * own + temporaries


def persistent_numbers(shape: ModelShape, setup: Setup) -> int:
    """Numbers of parameters that are too small to be cut (`stage3_param_persistence_threshold`)."""
    attention = [shape.hidden * shape.q_width] * 2 + [shape.hidden * shape.kv_width] * 2
    mlp = [shape.largest_mlp_weight] * (3 if shape.gated else 2)
    small = sum(size for size in (*attention, *mlp, shape.hidden, shape.hidden) if size <= setup.persistent)
    return shape.layers * small + shape.hidden


def resting_bytes(shape: ModelShape, setup: Setup) -> int:
    """Whole parameters between steps: the small ones."""
    return shape.itemsize * persistent_numbers(shape, setup) if setup.stage == 3 else 0


def gathered_bytes(shape: ModelShape, setup: Setup) -> int:
    """Whole parameters that exist at the busiest moment.

    DeepSpeed releases a parameter after use only if what is gathered exceeds `stage3_max_live_parameters` or its next
    use is further than `stage3_max_reuse_distance` away (both 1e9 numbers by default): a small model stays gathered.
    """
    if setup.stage < 3:
        return 0
    at_least = max(shape.layer_weights, shape.embedding) + min(setup.prefetch, shape.parameters)
    return shape.itemsize * min(shape.parameters, max(setup.live, at_least))

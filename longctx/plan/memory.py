"""Predict the bytes that one rank holds, by part, at the moments of a step that can be its peak.

Between these moments a step is linear in the layers done (saved activations shrink while gradients grow), so the peak
is at an end: the loss, the backward of the last layer or of the first, or the optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from longctx.plan import activations, buffers, states
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape

PARTS = {
    "weights": "as stored between uses: shards under ZeRO-3, and the secondary shards of zero.group",
    "gradients": "computed so far, and buffers for them",
    "optimizer": "fp32 master weights and optimizer states",
    "gathered parameters": "whole parameters under ZeRO-3: in use, prefetched, or not yet released",
    "saved activations": "what forward saves for backward (checkpoints, with memory.recompute)",
    "active layer": "recomputed activations and gradients of the layer whose backward runs",
    "attention buffers": "of attention's backward: dout, dq in fp32, statistics",
    "ring buffers": "key/value blocks and their gradients, held and in flight; all-to-all buffers",
    "mlp tile": "intermediates of an MLP and their gradients (memory.mlp_tile)",
    "logits tile": "logits and their gradients (memory.loss_tile), and gradients that the loss saves",
    "workspace": "inputs, rotary tables, gradient buckets, temporaries of the optimizer",
}
"""name of a part -> what it is; the rows of every table"""


@dataclass(frozen=True)
class Moment:
    """A point of a step, and the bytes of every part at that point."""

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class StepBytes:
    """Predicted bytes of one rank: on the device by moment, on the host by part, on NVMe."""

    moments: tuple[Moment, ...]
    host: dict[str, int]
    disk: int = 0

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)


def step_bytes(shape: ModelShape, setup: Setup) -> StepBytes:
    """Predict what one rank of this run holds, by moment and part."""
    return StepBytes(tuple(_moments(shape, setup)), host_bytes(shape, setup), states.swapped_bytes(shape, setup))


def peak_bytes(shape: ModelShape, setup: Setup) -> int:
    """Predict one rank's peak on the device."""
    return step_bytes(shape, setup).peak.total


def host_bytes(shape: ModelShape, setup: Setup) -> dict[str, int]:
    """Predict what one rank offloads to the host, by part."""
    found = {}
    if setup.offload_optimizer:
        found["optimizer"] = states.host_optimizer_bytes(shape, setup)
    if setup.offload_parameters:
        found["weights"] = shape.itemsize * states.share(shape.parameters, setup, 3) + states.copy_bytes(shape, setup)
    if setup.offload_checkpoints and setup.recompute in ("layer", "layer_keep_attention"):
        found["saved activations"] = activations.checkpoint_saved(shape, setup) * shape.layers * setup.n
    return found


def _moments(shape: ModelShape, setup: Setup) -> Iterator[Moment]:
    saved = setup.n * activations.layer_saved(shape, setup)
    fetched = setup.n * activations.checkpoint_fetched(shape, setup)
    head = 0 if shape.tied else shape.embedding

    # At the loss all layers have saved their activations and no gradient exists. Offloaded checkpoints of the last two
    # layers are still on their way to the host: as many bytes as backward later fetches at once.
    leaving = setup.n * activations.checkpoint_fetched(shape, setup, attended=True)
    norm = setup.n * activations.norm_saved(shape, setup)  # the norm before the head
    held = {"saved activations": shape.layers * saved + leaving + norm}
    yield Moment("loss", _sum(_base(shape, setup, 0), held, _loss(shape, setup)))

    # Within a layer's backward the MLP comes first, then the norm before it, attention, and the projections. The last
    # layer has the most saved activations, the first the most gradients. A tied head's gradient belongs to the
    # embedding.
    for name, layers, computed in (
        ("backward of the last layer", shape.layers, head + shape.layer_weights),
        ("backward of the first layer", 1, shape.parameters - (head if shape.tied else shape.embedding)),
    ):
        base = _sum(_base(shape, setup, computed), {"saved activations": layers * saved + fetched})
        yield Moment(f"{name}: MLP", _sum(base, _mlp(shape, setup)))
        if not setup.recompute_norms:  # only autograd holds five fp32 tensors at once
            yield Moment(f"{name}: norm", _sum(base, _norm(shape, setup)))
        yield Moment(f"{name}: attention", _sum(base, _attention(shape, setup)))
        if setup.offload_checkpoints:  # the next layer's checkpoints are fetched meanwhile
            yield Moment(f"{name}: projections", _sum(base, _projections(shape, setup)))

    # The embedding's gradient is whole before stages 1 and 2 reduce it. Stage 3 shards it like any other.
    if setup.stage in (1, 2):
        gradient = shape.itemsize * min(shape.embedding, shape.trainable)
        whole = {"gradients": gradient, "workspace": states.large_gradient_bytes(shape, setup)}
        yield Moment("backward of the embedding", _sum(_base(shape, setup, shape.parameters - head), whole))

    # In the optimizer step all activations are gone, and all gradients are there.
    update = {"workspace": states.update_bytes(shape, setup)}
    yield Moment("optimizer step", _sum(_base(shape, setup, shape.parameters, updating=True), update))


def _base(shape: ModelShape, setup: Setup, computed: int, updating: bool = False) -> dict[str, int]:
    """Return what is held throughout the step, with the gradients of ``computed`` parameters.

    In the optimizer step (``updating``) the batch and all but the smallest gathered parameters have been freed.
    """
    gathered = states.resting_bytes(shape, setup) if updating else states.gathered_bytes(shape, setup)
    inputs = 0 if updating else setup.n * (activations.rotary_saved(shape) + activations.input_bytes())
    gradients = states.resident_gradient_bytes(shape, setup) + states.computed_gradient_bytes(shape, setup, computed)
    fixed = states.bucket_bytes(shape, setup, computed) + states.offload_bytes(shape, setup)
    return {
        "weights": states.weight_bytes(shape, setup),
        "gradients": gradients,
        "optimizer": states.optimizer_bytes(shape, setup),
        "gathered parameters": gathered,
        "workspace": inputs + fixed,
    }


def _loss(shape: ModelShape, setup: Setup) -> dict[str, int]:
    tile = buffers.loss_tile_bytes(shape, setup) + buffers.loss_gradient_bytes(shape, setup)
    return {"logits tile": tile}


def _mlp(shape: ModelShape, setup: Setup) -> dict[str, int]:
    """Return the parts of the MLP's backward. The recomputed layer is whole; the residual stream and the MLP's input
    have a gradient each."""
    width = shape.itemsize * shape.hidden * setup.n
    # An MLP that recomputes has its norm's output recomputed as well.
    norm_output = width if setup.recompute_norms and activations.recomputed_mlp(setup) else 0
    return {
        "active layer": _recomputed(shape, setup) + 2 * width + norm_output,
        "mlp tile": buffers.mlp_tile_bytes(shape, setup),
        "gradients": buffers.mlp_gradient_bytes(shape, setup),
    }


def _norm(shape: ModelShape, setup: Setup) -> dict[str, int]:
    """Return the parts of the backward of the norm before the MLP, whose output and normalised input are freed by
    then."""
    width, recomputed = shape.itemsize * shape.hidden * setup.n, _recomputed(shape, setup)
    freed = 2 * width
    if setup.recompute == "none" and not activations.tiled_mlp(setup):
        freed += setup.n * activations.mlp_intermediates(shape)
    needed = width + setup.n * activations.norm_backward(shape)
    return _freeing(recomputed, freed, needed)


def _attention(shape: ModelShape, setup: Setup) -> dict[str, int]:
    """Return the parts of attention's backward. The MLP, its norm and the output projection are done: what they saved
    is freed, attention's output by token included."""
    freed = activations.norms_saved(shape, setup)[1] + shape.itemsize * shape.q_width
    if setup.recompute == "none" and not activations.tiled_mlp(setup):
        freed += activations.mlp_intermediates(shape)
    width = shape.itemsize * shape.hidden * setup.n
    return _freeing(_recomputed(shape, setup), setup.n * freed, width) | {
        "attention buffers": buffers.attention_backward(shape, setup),
        "ring buffers": buffers.ring_backward(shape, setup) + buffers.ulysses_buffers(shape, setup),
    }


def _freeing(recomputed: int, freed: int, needed: int) -> dict[str, int]:
    """Subtract ``freed`` from where the layer's activations are counted: the active layer if they were recomputed, else
    the saved activations."""
    if recomputed:
        return {"active layer": recomputed - freed + needed, "saved activations": 0}
    return {"active layer": needed, "saved activations": -freed}


def _projections(shape: ModelShape, setup: Setup) -> dict[str, int]:
    """Return the parts of the backward of the q, k, v projections, while the next layer's checkpoints are fetched: the
    gradients of q, k and v, the norm's output with two gradients, and the residual stream's gradient."""
    widths = shape.itemsize * (4 * shape.hidden + shape.q_width + 2 * shape.kv_width)
    fetched, attended = (activations.checkpoint_fetched(shape, setup, attended=after) for after in (False, True))
    return {"active layer": setup.n * widths, "saved activations": setup.n * (attended - fetched)}


def _recomputed(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes of activations that backward recomputes for one layer, without its checkpoint and its MLP."""
    if setup.recompute not in ("layer", "layer_keep_attention"):
        return 0
    whole = sum(activations.norms_saved(shape, setup)) + activations.attention_saved(shape)
    if setup.recompute == "layer_keep_attention":
        whole -= activations.attention_output(shape)
    if shape.itemsize == 4 or setup.recompute_norms:
        whole -= shape.itemsize * shape.hidden  # the first norm saves its input as it is: the layer's own checkpoint
    return setup.n * whole


def _sum(*parts: dict[str, int]) -> dict[str, int]:
    """Add dictionaries of bytes, in the order of PARTS."""
    return {name: sum(part.get(name, 0) for part in parts) for name in PARTS if any(part.get(name) for part in parts)}

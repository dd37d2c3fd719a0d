"""What one rank holds, part by part, at the moments of a step when it may hold most; the largest of them is the peak.

Between its moments a step is linear in the layers done (kept results shrink as gradients grow), so the ends decide:
the loss, the backward of the last layer and of the first, the optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from longctx.plan import activations, buffers, states
from longctx.plan.setup import Setup
from longctx.plan.shape import ModelShape

PARTS = {
    "weights": "as they are stored; ZeRO-3 cuts them; and their copy in a node (zero.group)",
    "gradients": "made so far, and buffers for them",
    "optimizer": "fp32 master weights, and the optimizer's own numbers",
    "gathered parameters": "whole ones under ZeRO-3: in use, prefetched, not yet let go",
    "kept results": "what forward keeps of its layers for backward (checkpoints: memory.recompute)",
    "layer at work": "the recomputed results of the layer whose backward runs",
    "attention buffers": "fp32 accumulators of attention, and its rotated inputs",
    "ring buffers": "blocks of keys, values and their gradients here and on their way; exchanged heads",
    "mlp tile": "inner results of an MLP and their gradients (memory.mlp_tile)",
    "logits tile": "logits and their gradients (memory.loss_tile), and what the loss keeps",
    "workspace": "inputs, rotary tables, gradient buckets, the optimizer's temporaries",
}
"""name of a part -> what it is; the columns of every table"""


@dataclass(frozen=True)
class Moment:
    """A point of a step, and the bytes of every part at it."""

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class StepBytes:
    """A rank's memory: its moments, and what it keeps on the host."""

    moments: tuple[Moment, ...]
    host: dict[str, int]
    disk: int = 0
    """Bytes of the optimizer on NVMe."""

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)


def step_bytes(shape: ModelShape, setup: Setup) -> StepBytes:
    """Return what a rank of this run holds, by moments and parts."""
    return StepBytes(tuple(_moments(shape, setup)), host_bytes(shape, setup), states.swapped_bytes(shape, setup))


def peak_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return the most that a rank holds at once."""
    return step_bytes(shape, setup).peak.total


def host_bytes(shape: ModelShape, setup: Setup) -> dict[str, int]:
    """Return what is offloaded to the host, by part, of one rank."""
    found = {}
    if setup.offload_optimizer:
        found["optimizer"] = states.host_optimizer_bytes(shape, setup)
    if setup.offload_parameters:
        found["weights"] = shape.itemsize * states.share(shape.parameters, setup, 3) + states.copy_bytes(shape, setup)
    if setup.offload_checkpoints and setup.recompute in ("layer", "layer_keep_attention"):
        found["kept results"] = activations.checkpoint_kept(shape, setup) * shape.layers * setup.n
    return found


def _moments(shape: ModelShape, setup: Setup) -> Iterator[Moment]:
    kept, fetched = setup.n * activations.layer_kept(shape, setup), setup.n * activations.fetched(shape, setup)
    leaving = setup.n * activations.fetched(shape, setup, attended=True)  # as many as come back: two layers'
    head = 0 if shape.tied else shape.embedding
    everything = shape.parameters
    yield Moment(
        "loss", _sum(_base(shape, setup, 0), _ends(shape, setup, shape.layers * kept + leaving), _loss(shape, setup))
    )
    for name, layers, made in (
        ("backward of the last layer", shape.layers, head + shape.layer_weights),
        ("backward of the first layer", 1, everything - head if shape.tied else everything - shape.embedding),
    ):
        base = _sum(_base(shape, setup, made), {"kept results": layers * kept + fetched})
        yield Moment(f"{name}: MLP", _sum(base, _mlp(shape, setup)))
        if not setup.recompute_norms:
            yield Moment(f"{name}: norm", _sum(base, _norm(shape, setup)))
        yield Moment(f"{name}: attention", _sum(base, _attention(shape, setup)))
        if setup.offload_checkpoints:
            yield Moment(f"{name}: projections", _sum(base, _projections(shape, setup)))
    if setup.stage in (1, 2):
        whole = {"gradients": shape.itemsize * shape.embedding, "workspace": states.large_gradient_bytes(shape, setup)}
        yield Moment("backward of the embedding", _sum(_base(shape, setup, everything - head), whole))
    step = {"workspace": states.update_bytes(shape, setup)}
    yield Moment("optimizer step", _sum(_base(shape, setup, everything, resting=True), step))


def _base(shape: ModelShape, setup: Setup, made: int, resting: bool = False) -> dict[str, int]:
    """What is there all the time, and the gradients of ``made`` parameters."""
    gathered = states.resting_bytes(shape, setup) if resting else states.gathered_bytes(shape, setup)
    inputs = 0 if resting else setup.n * (activations.rotary_kept(shape) + activations.inputs_kept())
    gradients = states.resident_gradient_bytes(shape, setup) + states.made_gradient_bytes(shape, setup, made)
    fixed = states.bucket_bytes(shape, setup, made) + states.offload_bytes(shape, setup)
    return {
        "weights": states.weight_bytes(shape, setup),
        "gradients": gradients,
        "optimizer": states.optimizer_bytes(shape, setup),
        "gathered parameters": gathered,
        "workspace": inputs + fixed,
    }


def _ends(shape: ModelShape, setup: Setup, layers: int) -> dict[str, int]:
    """Kept results of all layers and of the norm before the head."""
    return {"kept results": layers + setup.n * activations.norm_kept(shape, setup)}


def _loss(shape: ModelShape, setup: Setup) -> dict[str, int]:
    tile = buffers.loss_tile_bytes(shape, setup) + buffers.loss_gradient_bytes(shape, setup)
    return {"logits tile": tile}


def _mlp(shape: ModelShape, setup: Setup) -> dict[str, int]:
    """The layer whose MLP's backward runs: recomputed before it, if that is the policy; two gradients of its width."""
    width = shape.itemsize * shape.hidden * setup.n
    made_anew = width if setup.recompute_norms and activations.recomputed_mlp(setup) else 0
    return {
        "layer at work": _recomputed(shape, setup) + 2 * width + made_anew,
        "mlp tile": buffers.mlp_tile_bytes(shape, setup),
        "gradients": buffers.mlp_gradient_bytes(shape, setup),
    }


def _norm(shape: ModelShape, setup: Setup) -> dict[str, int]:
    """The layer whose second norm's backward runs: what that gave the MLP, and the normalised input, are let go."""
    width, recomputed = shape.itemsize * shape.hidden * setup.n, _recomputed(shape, setup)
    gone = 2 * width
    if setup.recompute == "none" and not activations.tiled_mlp(setup):
        gone += setup.n * activations.mlp_inner(shape)
    chain = width + setup.n * activations.norm_backward(shape)
    return {
        "layer at work": recomputed - gone + chain if recomputed else chain,
        "kept results": 0 if recomputed else -gone,
    }


def _attention(shape: ModelShape, setup: Setup) -> dict[str, int]:
    """The layer whose attention's backward runs: its MLP is done."""
    width, recomputed = shape.itemsize * shape.hidden * setup.n, _recomputed(shape, setup)
    gone = _after_attention(shape, setup)
    return {
        "layer at work": recomputed - gone + width if recomputed else width,
        "kept results": 0 if recomputed else -gone,
        "attention buffers": buffers.attention_backward(shape, setup),
        "ring buffers": buffers.ring_backward(shape, setup) + buffers.ulysses_buffers(shape, setup),
    }


def _projections(shape: ModelShape, setup: Setup) -> dict[str, int]:
    """The layer whose attention's backward is done, while the next one's checkpoints come back: the gradients of q, k,
    v, the norm's result, two gradients of it, and the residual stream's."""
    widths = shape.itemsize * (4 * shape.hidden + shape.q_width + 2 * shape.kv_width)
    coming = activations.fetched(shape, setup, attended=True) - activations.fetched(shape, setup)
    return {"layer at work": setup.n * widths, "kept results": setup.n * coming}


def _recomputed(shape: ModelShape, setup: Setup) -> int:
    """What backward has to make of a layer again, beside what was kept of it."""
    if setup.recompute not in ("layer", "layer_keep_attention"):
        return 0
    whole = sum(activations.norms_kept(shape, setup)) + activations.attention_kept(shape)
    if setup.recompute == "layer_keep_attention":
        whole -= activations.attention_result(shape)
    if shape.itemsize == 4 or setup.recompute_norms:
        whole -= shape.itemsize * shape.hidden  # the first norm's input is the layer's own
    return setup.n * whole


def _after_attention(shape: ModelShape, setup: Setup) -> int:
    """Of the layer, what is let go before attention's backward: the second norm's, its MLP's, the result by token."""
    gone = activations.norms_kept(shape, setup)[1] + shape.itemsize * shape.q_width
    if setup.recompute == "none" and not activations.tiled_mlp(setup):
        gone += activations.mlp_inner(shape)
    return setup.n * gone


def _sum(*parts: dict[str, int]) -> dict[str, int]:
    """Add dictionaries of bytes, in the order of PARTS."""
    return {name: sum(part.get(name, 0) for part in parts) for name in PARTS if any(part.get(name) for part in parts)}

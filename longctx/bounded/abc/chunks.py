"""ABC over a local sequence by chunks, with its own backward: the training form.

Forward saves the inputs and the state at the start of each block. Backward goes through the blocks from last to first
and recomputes each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from longctx.bounded.abc import weights
from longctx.bounded.abc.block import BlockGradient, BlockPass, BlockState, BlockWeights
from longctx.bounded.abc.weights import Normalizer
from longctx.bounded.chunks import Block, unfold
from longctx.bounded.walk import ChunkWalk, blocks_of
from longctx.derivative import first_only

Optional = torch.Tensor | None


class ABCTensors(NamedTuple):
    """The tensors of one call; see `abc_attention` for the shapes.

    s_k, s_v: the controls of keys and values. z_k, z_v, keys, values: the state before. s_v and z_v are None where keys
    and values share one control. ids (B, T) and document (B,) as in `Runs`, or None for one document.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    s_k: torch.Tensor
    s_v: Optional
    z_k: torch.Tensor
    z_v: Optional
    keys: torch.Tensor
    values: torch.Tensor
    ids: Optional = None
    document: Optional = None


@dataclass(frozen=True)
class ChunkSettings:
    """The settings of one call. scale: of the logits that read the slots. chunk: tokens per chunk."""

    normalizer: Normalizer
    scale: float
    chunk: int


State = tuple[torch.Tensor, Optional, torch.Tensor, torch.Tensor]
"""(z_k, z_v, keys, values)."""


@first_only
class Chunked(torch.autograd.Function):
    """(settings, *ABCTensors) -> (out, z_k, z_v, keys, values after the last token)."""

    @staticmethod
    def forward(ctx: Any, settings: ChunkSettings, *tensors: Optional) -> tuple[Optional, ...]:
        x = ABCTensors(*tensors)  # type: ignore[arg-type]
        walk = _ABCWalk(x, settings)
        out = x.q.new_empty((*x.q.shape[:3], x.v.shape[3]))
        state: State = (x.z_k, x.z_v, x.keys, x.values)
        ctx.steps = []
        for block in blocks_of(x.q, settings.chunk):
            state = walk.forward(block, state, out, ctx.steps)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        ctx.save_for_backward(*tensors, *state[2:])
        # Clone: autograd does not allow an output that is an input, as a state is to which nothing was written.
        return (out, *(None if part is None else part.clone() for part in state))

    @staticmethod
    def backward(ctx: Any, dout: Optional, dz_k: Optional, dz_v: Optional, dkeys: Optional, dvalues: Optional) -> Any:
        *tensors, last_keys, last_values = ctx.saved_tensors
        x = ABCTensors(*tensors)
        walk = _ABCWalk(x, ctx.settings)
        dkeys = torch.zeros_like(x.keys) if dkeys is None else dkeys
        dvalues = torch.zeros_like(x.values) if dvalues is None else dvalues
        gains = walk.mass_gains((dkeys, last_keys), (dvalues, last_values))
        gradient = BlockGradient(
            dkeys,
            dvalues,
            tuple(gain if dz is None else gain - dz[..., None] for gain, dz in zip(gains, (dz_k, dz_v), strict=False)),
        )
        if dout is None:
            dout = x.q.new_zeros((*x.q.shape[:3], x.v.shape[3]))
        grads = [torch.empty_like(y) for y in (x.q, x.k, x.v, *walk.controls)]
        for block, state in reversed(ctx.steps):
            gradient = walk.backward(block, state, dout, gradient, grads)
        dz = walk.mass_gradient_before(gradient)
        ds_v, dz_v = (grads[4], dz[1]) if x.s_v is not None else (None, None)
        return None, *grads[:4], ds_v, dz[0], dz_v, gradient.keys, gradient.values, None, None


class _ABCWalk(ChunkWalk):
    """The blocks of one call, in either direction."""

    def __init__(self, x: ABCTensors, settings: ChunkSettings) -> None:
        super().__init__(x.q, x.k, x.v, x.ids, x.document)
        self.x, self.settings = x, settings
        self.controls = [x.s_k] if x.s_v is None else [x.s_k, x.s_v]

    def forward(self, block: Block, state: State, out: torch.Tensor, steps: list[Any]) -> State:
        """Compute one block, in halves if a chunk's logits grow too much; append (block, state before) to `steps` and
        return the state after it."""
        block_pass = self._pass(block, state)
        if block_pass is None:
            for half in block.halves():
                state = self.forward(half, state, out, steps)
            return state
        steps.append((block, state))
        unfold(out, block, block_pass.forward())
        mass_v = None if block_pass.weights.tied else block_pass.w_v.mass
        return block_pass.w_k.mass, mass_v, block_pass.after.keys, block_pass.after.values

    def backward(
        self, block: Block, state: State, dout: torch.Tensor, gradient: BlockGradient, grads: list[torch.Tensor]
    ) -> BlockGradient:
        """Write one block's gradients into `grads` and return the gradient of the state before it."""
        block_pass = self._pass(block, state)
        assert block_pass is not None
        parts, gradient = block_pass.backward(self.fold(dout, block).contiguous(), gradient)
        parts[0].mul_(self.settings.scale)
        for whole, part in zip(grads, parts, strict=True):
            unfold(whole, block, part)
        return gradient

    def _pass(self, block: Block, state: State) -> BlockPass | None:
        """Return the pass over one block, None if it must be split."""
        z_k, z_v, keys, values = state
        masks, found = self.masks(block), []
        for control, mass in zip(self.controls, (z_k, z_v), strict=False):
            assert mass is not None
            one = weights.make(self.fold(control, block), mass, masks, self.settings.normalizer)
            if one is None:
                return None
            found.append(one)
        q, k, v = self.inputs(block, masks)
        return BlockPass(q * self.settings.scale, k, v, BlockWeights(*found), masks, BlockState(keys, values))

    def mass_gains(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """Return, per control, how much the loss falls as the mass that a state is divided by grows: (B, G, M, 1).

        Args:
            pairs: (gradient, state) of keys and of values.
        """
        gains = [torch.zeros_like(state[..., :1]) for _, state in pairs]
        if self.settings.normalizer == Normalizer.PREFIX:  # a state is a mean: it is divided by the mass
            gains = [(gradient * state).sum(-1, keepdim=True) for gradient, state in pairs]
        return gains if len(self.controls) > 1 else [gains[0] + gains[1]]

    def mass_gradient_before(self, gradient: BlockGradient) -> list[torch.Tensor]:
        """Return the gradient of each control's log mass before the first token: the state acts as one more token."""
        gains = self.mass_gains((gradient.keys, self.x.keys), (gradient.values, self.x.values))
        if self.settings.normalizer == Normalizer.SUM:
            return [torch.zeros_like(gain[..., 0]) for gain in gains]
        return [(gain - mass)[..., 0] for gain, mass in zip(gains, gradient.minus_mass, strict=True)]

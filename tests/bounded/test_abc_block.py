"""One block of ABC: forward equals the definition, and the written-out backward equals autograd."""

from __future__ import annotations

import pytest
import torch
from bounded import direct
from bounded.inputs import PACKED, of_abc

from longctx.bounded.abc import weights
from longctx.bounded.abc.block import BlockGradient, BlockPass, BlockState, BlockWeights
from longctx.bounded.abc.weights import Normalizer
from longctx.bounded.chunks import Block, Runs, causal_masks, fold, unfold

BLOCK = Block(0, 4, 9)
SCALE = 0.7


@pytest.mark.parametrize("normalizer", list(Normalizer))
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_block_equals_the_definition(normalizer: Normalizer, pair: bool, packed: bool) -> None:
    (q, k, v, s_k, s_v), dout, _ = of_abc(length=36)
    ids = PACKED[:, :36] if packed else None
    leaves = [q, k, v, s_k, *([s_v] if pair else [])]
    expected = direct.abc(q, k, v, s_k, leaves[-1], direct.visible(36, ids), normalizer.value, SCALE)
    wanted = direct.gradients(expected, dout, leaves)

    masks = causal_masks(9, torch.float64, q.device) if ids is None else Runs(ids, None).masks(BLOCK, torch.float64)
    folded = [fold(x.detach(), BLOCK, 2, torch.float64) for x in leaves]
    empty = torch.full((2, 2, 4), -torch.inf, dtype=torch.float64)
    made = [weights.make(s, empty, masks, normalizer) for s in folded[3:]]
    assert all(w is not None for w in made)
    before = BlockState(torch.zeros(2, 2, 4, 5).double(), torch.zeros(2, 2, 4, 3).double())
    block = BlockPass(folded[0] * SCALE, folded[1], folded[2], BlockWeights(*made), masks, before)  # type: ignore[arg-type]
    out = torch.empty_like(expected)
    unfold(out, BLOCK, block.forward())

    after = BlockGradient(before.keys, before.values, tuple(torch.zeros(2, 2, 4, 1).double() for _ in made))
    parts, _ = block.backward(fold(dout, BLOCK, 2, torch.float64).contiguous(), after)
    parts[0].mul_(SCALE)
    found = [torch.empty_like(x) for x in leaves]
    for whole, part in zip(found, parts, strict=True):
        unfold(whole, BLOCK, part)
    assert max(direct.differences([out, *found], [expected, *wanted])) <= direct.EXACT

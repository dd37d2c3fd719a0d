"""ABC by chunks equals ABC token by token, from a state to a state and for logits of any size."""

from __future__ import annotations

import pytest
import torch
from bounded import direct
from bounded.inputs import PACKED, leaf, of_abc

from longctx.bounded.abc import chunks
from longctx.bounded.abc.operator import abc_attention
from longctx.bounded.abc.weights import Normalizer
from longctx.kernels.abc import reference

from tolerances import tolerance

EXACT = tolerance("fp64")
SCALE = 0.7


@pytest.mark.parametrize("normalizer", ["prefix", "running", "sum"])
@pytest.mark.parametrize("docs", [False, True])
def test_states_and_their_gradients(normalizer: str, docs: bool) -> None:
    """Chunked equals token by token, from a state to a state, with the gradients of both."""
    (q, k, v, s, _), weight, g = of_abc()
    documents, document = (PACKED, torch.tensor([4, 1])) if docs else (None, None)
    first = [leaf(g, *shape) for shape in ((2, 2, 4), (2, 2, 4, 5), (2, 2, 4, 3))]
    leaves = [q, k, v, s, *first]
    out, after, _ = reference.recurrent(
        q, k, v, s, tuple(first), documents, document, normalizer=normalizer, scale=SCALE
    )
    tensors = chunks.ABCTensors(q, k, v, s, None, first[0], None, first[1], first[2], documents, document)
    how = chunks.ChunkSettings(Normalizer(normalizer), SCALE, 8)
    chunked, mass, _, keys, values = chunks.Chunked.apply(how, *tensors)
    theirs, ours = [out, *after[1:]], [chunked, keys, values]
    if normalizer != "sum":  # there the mass only tells which slots were written
        theirs, ours = [*theirs, after[0]], [*ours, mass]
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in theirs]
    both = []
    for results in (ours, theirs):
        loss = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
        both.append([*results, *torch.autograd.grad(loss, leaves, allow_unused=True)])
    assert max(direct.differences(*both)) <= EXACT


@pytest.mark.parametrize("spread", [30.0, 500.0, 5000.0])
def test_logits_of_any_size(spread: float) -> None:
    """If a slot gains more than a float holds within a chunk, the chunk is split, and the result stays exact."""
    leaves, weight, _ = of_abc(spread=spread)
    q, k, v, s, _ = leaves
    expected = direct.abc(q, k, v, s, s, direct.visible(37, None), "prefix", SCALE)
    ours = abc_attention(q, k, v, s, scale=SCALE)
    # Gradients of logits are differences of terms as large as the logits' effect: relative to the spread.
    direct.check(ours, expected, weight, leaves, EXACT * spread)


def test_rising_logits_in_single_precision() -> None:
    """Logits that rise by 40 per token in fp32, where exp(-88) already underflows."""
    (q, k, v, _, _), _, g = of_abc()
    s = 40.0 * torch.arange(37.0)[None, None, :, None] + torch.randn(2, 2, 37, 4, generator=g)
    expected = direct.abc(q, k, v, s.double(), s.double(), direct.visible(37, None), "prefix", SCALE)
    ours = abc_attention(q.float(), k.float(), v.float(), s, scale=SCALE)
    assert ours.isfinite().all()
    # a logit of 1480 in fp32 is known to 1e-4 only: its weight is not better known
    assert direct.differences([ours.double()], [expected])[0] <= 100 * tolerance("fp32") * float(
        expected.detach().abs().max()
    )

"""Cross entropy of one tile: loss and gradient by torch against autograd in fp64, and the choice of the backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.errors import ModelError
from longctx.nn.entropy import Loss, check_backend, choose_backend, loss_and_gradient

from tolerances import tolerance


@settings(max_examples=20)
@given(
    st.integers(1, 6), st.integers(2, 9), st.sampled_from([None, 0.7, 30.0]), st.sampled_from([0.0, 0.5]),
    st.integers(0, 99),
)  # fmt: skip
def test_a_tile_equals_autograd(rows: int, words: int, softcap: float | None, z_loss: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, words, generator=g, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(-1, words, (rows,), generator=g)
    bounded = logits if softcap is None else softcap * (logits / softcap).tanh()
    lse = bounded.logsumexp(-1) * (labels != -1)
    expected = F.cross_entropy(bounded, labels, ignore_index=-1, reduction="sum") + z_loss * lse.square().sum()
    (wanted,) = torch.autograd.grad(expected, logits)
    rule = Loss(softcap, z_loss, -1)
    for differentiate in (True, False):
        tile = logits.detach().clone()
        loss, gradient = loss_and_gradient(tile, labels, rule, backend="torch", differentiate=differentiate)
        torch.testing.assert_close(loss, expected.detach(), rtol=tolerance("fp64"), atol=tolerance("fp64"))
        if differentiate:
            torch.testing.assert_close(gradient, wanted, rtol=tolerance("fp64"), atol=tolerance("fp64"))
            assert gradient.data_ptr() == tile.data_ptr()  # overwritten in place


def test_low_precision_is_computed_in_fp32() -> None:
    logits, labels = torch.randn(3, 5).bfloat16(), torch.tensor([0, 4, 2])
    loss, gradient = loss_and_gradient(logits.clone(), labels, Loss(None, 0.0, -1), backend="torch", differentiate=True)
    exact, _ = loss_and_gradient(logits.double(), labels, Loss(None, 0.0, -1), backend="torch", differentiate=True)
    assert loss.dtype == gradient.dtype == torch.float32
    assert abs(float(loss) - float(exact)) <= tolerance("fp32") * float(exact)


def test_the_backend_follows_device_and_dtype() -> None:
    single, double = torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.float64)
    assert choose_backend("auto", single) == choose_backend("torch", single) == "torch"
    assert choose_backend("triton", single) == "triton"  # interpreted, in tests
    with pytest.raises(ModelError, match="backend='triton'.*use 'auto' or 'torch'"):
        choose_backend("triton", double)
    with pytest.raises(ModelError, match="use one of 'auto', 'torch', 'triton'"):
        check_backend("cuda")

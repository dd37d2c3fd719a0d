"""The cross entropy kernel, interpreted, against all logits in fp64; what it does not write is NaN (conftest.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import ModelError
from longctx.kernels.cross_entropy import tiles
from longctx.kernels.cross_entropy.reference import loss_and_gradient as reference
from longctx.nn import entropy
from longctx.nn.loss import tiled_loss

from tolerances import tolerance

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ERROR = {name: tolerance(name) for name in DTYPES}
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def draw(rows: int, vocabulary: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, vocabulary, (rows,), generator=g)
    return 4 * torch.randn(rows, vocabulary, generator=g).to(dtype), labels.masked_fill(labels < 0, -7)


def fused(logits: torch.Tensor, labels: torch.Tensor, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    loss = entropy.Loss(given.get("softcap"), given.get("z_loss", 0.0), -7)
    made: tuple[torch.Tensor, torch.Tensor] = entropy.loss_and_gradient(
        logits, labels, loss, backend="triton", differentiate=given.get("differentiate", True)
    )
    return made


def near(got: torch.Tensor, wanted: torch.Tensor, limit: float) -> None:
    assert (got.double().cpu() - wanted).norm() <= limit * wanted.norm()


@given(
    rows=st.integers(0, 5), vocabulary=st.integers(1, 67), dtype=st.sampled_from(sorted(DTYPES)),
    softcap=st.sampled_from([None, 0.7, 30.0]), z_loss=st.sampled_from([0.0, 1e-4, 0.5]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_rows_equal_the_definition(
    rows: int, vocabulary: int, dtype: str, softcap: float | None, z_loss: float, seed: int
) -> None:
    logits, labels = draw(rows, vocabulary, seed, DTYPES[dtype])
    losses, gradient = reference(logits.double(), labels, softcap=softcap, z_loss=z_loss, ignore_index=-7)
    total, got = fused(logits, labels, softcap=softcap, z_loss=z_loss)
    assert total.dtype == torch.float32
    assert got.dtype == DTYPES[dtype]
    assert got is logits  # in place
    near(total, losses.sum(), ERROR["fp32"])
    # (1 + 2 z lse) p - onehot: a difference of numbers of size one, however small it is
    assert (got.double() - gradient).norm() <= ERROR[dtype] * max(gradient.norm(), rows**0.5)
    assert bool((got[labels == -7] == 0).all())


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_reference_is_what_autograd_makes_of_the_loss(softcap: float | None) -> None:
    logits, labels = draw(9, 13, 0, torch.float64)
    logits.requires_grad_()
    losses, gradient = reference(logits, labels, softcap=softcap, z_loss=0.3, ignore_index=-7)
    (wanted,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(gradient, wanted, rtol=tolerance("fp64"), atol=tolerance("fp64"))
    x = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = torch.nn.functional.cross_entropy(x, labels, ignore_index=-7, reduction="none")
    torch.testing.assert_close(losses, plain + 0.3 * x.logsumexp(-1).square() * (labels != -7))


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_tiled_loss_and_its_gradients(device: str, dtype: str) -> None:
    """At a real vocabulary on a GPU, small in the interpreter; bias, softcap and z-loss together."""
    tokens, width, vocabulary = (4096, 256, 128_256) if device == "cuda" else (50, 8, 40)
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(*shape, generator=g) for shape in ((tokens, width), (vocabulary, width), (vocabulary,))]
    low = [x.to(DTYPES[dtype]).to(device).requires_grad_() for x in (inputs[0], inputs[1] / width**0.5, inputs[2])]
    labels = torch.randint(0, vocabulary, (tokens,), generator=g).to(device)
    labels[::5] = -100

    def made(backend: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
        options: dict[str, Any] = dict(bias=bias, softcap=5.0, z_loss=0.01, tile=tokens // 3, backend=backend)
        loss = tiled_loss(hidden[None], weight, labels[None], **options)
        return [loss, *torch.autograd.grad(1.7 * loss, [hidden, weight, bias])]

    truth = made("torch", *[x.detach().double().requires_grad_() for x in low])
    ours = made("triton", *low)
    near(ours[0], truth[0].cpu(), tolerance("fp32" if dtype == "fp32" else "bf16 training loss"))
    for got, wanted in zip(ours[1:], truth[1:], strict=True):
        near(got, wanted.cpu(), ERROR[dtype])


def test_without_gradients_logits_stay() -> None:
    logits, labels = draw(5, 40, 2, torch.float32)
    before = logits.clone()
    total, _ = fused(logits, labels, differentiate=False)
    torch.testing.assert_close(total.double(), reference(before.double(), labels, ignore_index=-7)[0].sum())
    assert torch.equal(logits, before)


def test_rows_with_a_stride_and_infinite_logits() -> None:
    """A masked vocabulary has logits of -inf, whole steps of the kernel full of them; what lies between rows stays."""
    wide = torch.randn(4, 50)
    wide[:, :20] = -torch.inf
    labels = torch.tensor([39, 20, -7, 30])
    losses, gradient = reference(wide[:, :40].double(), labels, ignore_index=-7)
    beyond = wide[:, 40:].clone()
    total, _ = fused(wide[:, :40], labels)
    near(total, losses.sum(), ERROR["fp32"])
    near(wide[:, :40], gradient, ERROR["fp32"])
    assert torch.equal(wide[:, 40:], beyond)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    logits, labels = draw(3, 40, 3, torch.float32)
    logits[1, 33] = bad
    labels[1] = 2
    total, gradient = fused(logits, labels)
    assert total.isnan()
    assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()


def test_a_label_beyond_the_vocabulary_gives_nan_and_reads_nothing() -> None:
    logits, labels = draw(3, 40, 4, torch.float32)
    labels[1] = 40
    assert fused(logits, labels)[0].isnan()


def test_opcheck() -> None:
    logits, labels = draw(5, 40, 5, torch.float32)
    torch.library.opcheck(entropy._tile, (logits, labels, None, 0.1, -7, True))


def test_backends_that_cannot_are_named() -> None:
    hidden, weight, labels = torch.zeros(1, 3, 4), torch.zeros(7, 4), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ModelError, match="'auto', 'torch', 'triton'"):
        tiled_loss(hidden, weight, labels, backend="liger")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="float64; use 'auto' or 'torch'"):
        tiled_loss(hidden.double(), weight.double(), labels, backend="triton")
    assert entropy.choose_backend("auto", hidden) == "torch"
    assert entropy.choose_backend("triton", hidden) == "triton"


def test_wider_rows_take_wider_steps_up_to_a_limit() -> None:
    assert [tiles.choose(v, "sm_90").width for v in (1, 64, 1000, 32_000, 262_144)] == [64, 64, 1024, 4096, 4096]

"""tiled_loss equals cross entropy of all logits in fp64, forward and backward, and never allocates them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import longctx
from longctx.errors import ModelError
from longctx.nn.loss import tiled_loss

from tolerances import tolerance


def plain_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None = None,
    softcap: float | None = None, z_loss: float = 0.0, ignore_index: int = -100,
) -> torch.Tensor:  # fmt: skip
    """The definition, with every logit at once."""
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(-1)
    valid = labels.flatten() != ignore_index
    nll = F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction="none")
    return (nll + z_loss * lse.square() * valid).sum()


def gradients(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(1.7 * loss, inputs))


def make(rows: int, tokens: int, width: int, vocabulary: int, seed: int, bias: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    labels = torch.randint(-1, vocabulary, (rows, tokens), generator=generator)
    return draw(rows, tokens, width), draw(vocabulary, width), labels, draw(vocabulary) if bias else None


@given(
    rows=st.integers(1, 3), tokens=st.integers(1, 19), width=st.integers(1, 9), vocabulary=st.integers(1, 23),
    tile=st.one_of(st.just("auto"), st.integers(1, 64)), bias=st.booleans(),
    softcap=st.sampled_from([None, 0.7, 30.0]), z_loss=st.sampled_from([0.0, 1e-4, 0.5]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_equals_the_loss_of_all_logits(
    rows: int, tokens: int, width: int, vocabulary: int, tile: Any, bias: bool, softcap: Any, z_loss: float, seed: int
) -> None:
    hidden, weight, labels, b = make(rows, tokens, width, vocabulary, seed, bias)
    inputs = [hidden, weight, *([b] if bias else [])]
    labels = labels.masked_fill(labels < 0, -7)
    options: dict[str, Any] = dict(bias=b, softcap=softcap, z_loss=z_loss, ignore_index=-7)
    truth = plain_loss(hidden, weight, labels, **options)
    ours = tiled_loss(hidden, weight, labels, tile=tile, **options)
    torch.testing.assert_close(ours, truth, rtol=tolerance("fp64"), atol=tolerance("fp64"))
    for got, wanted in zip(gradients(ours, inputs), gradients(truth, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance("fp64"), atol=tolerance("fp64"))


def test_nothing_but_ignored_labels_is_a_zero_with_gradients() -> None:
    hidden, weight, labels, bias = make(2, 5, 4, 7, 0, True)
    loss = tiled_loss(hidden, weight, torch.full_like(labels, -100), bias=bias, tile=3)
    assert loss.item() == 0
    for gradient in gradients(loss, [hidden, weight, bias]):
        assert bool((gradient == 0).all())


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_has_no_gradient_and_the_rest_is_unchanged(frozen: str) -> None:
    hidden, weight, labels, _ = make(2, 9, 4, 7, 1, False)
    labels = labels.clamp(min=0)
    other = weight if frozen == "hidden" else hidden
    (wanted,) = gradients(plain_loss(hidden, weight, labels), [other])
    given_hidden, given_weight = (hidden.detach(), weight) if frozen == "hidden" else (hidden, weight.detach())
    (got,) = gradients(tiled_loss(given_hidden, given_weight, labels, tile=4), [other])
    torch.testing.assert_close(got, wanted, rtol=tolerance("fp64"), atol=tolerance("fp64"))


def test_a_tied_weight_gets_the_sum_of_both_gradients() -> None:
    _, weight, labels, _ = make(2, 9, 4, 7, 2, False)
    labels = labels.clamp(min=0)
    wanted = gradients(plain_loss(F.embedding(labels, weight).sin(), weight, labels), [weight])
    got = gradients(tiled_loss(F.embedding(labels, weight).sin(), weight, labels, tile=4), [weight])
    torch.testing.assert_close(got, wanted, rtol=tolerance("fp64"), atol=tolerance("fp64"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_logits_once_and_sums_in_fp32(dtype: torch.dtype) -> None:
    hidden, weight, labels, _ = make(1, 700, 16, 5000, 3, False)
    labels = labels.clamp(min=0)
    low = [(x.detach() / 4).to(dtype).requires_grad_() for x in (hidden, weight)]
    high = [x.detach().double().requires_grad_() for x in low]
    truth, ours = plain_loss(*high, labels), tiled_loss(*low, labels, tile=64)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), truth, rtol=tolerance("bf16 training loss"), atol=0)
    for got, wanted in zip(gradients(ours, low), gradients(truth, high), strict=True):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() <= tolerance("bf16 result") * wanted.norm()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_without_a_graph_break(backend: Any) -> None:
    hidden, weight, labels, _ = make(1, 40, 8, 50, 4, False)
    low = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    compiled = torch.compile(tiled_loss, fullgraph=True, backend="aot_eager")
    wanted = gradients(tiled_loss(*low, labels.clamp(min=0), tile=16), low)
    got = gradients(compiled(*low, labels.clamp(min=0), tile=16, backend=backend), low)
    for ours, plain in zip(got, wanted, strict=True):
        assert (ours - plain).norm() <= tolerance("fp32") * plain.norm()
    with pytest.raises(RuntimeError, match="in \\[0, 50\\)"):
        compiled(*low, labels.clamp(min=0) + 50, tile=16, backend=backend)


def test_autocast_computes_in_its_dtype() -> None:
    hidden, weight, labels, _ = make(1, 40, 16, 50, 4, False)
    hidden, weight, labels = hidden.detach().float(), weight.detach().float().requires_grad_(), labels.clamp(min=0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = tiled_loss(hidden, weight, labels, tile=16)
    same = tiled_loss(hidden.bfloat16(), weight.bfloat16(), labels, tile=16)
    assert ours.item() == same.item()
    assert gradients(ours, [weight])[0].dtype == torch.float32


class Sizes(TorchDispatchMode):
    """Record the size of the largest tensor that any operator returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_exist_for_more_than_a_tile(softcap: float | None, dtype: torch.dtype) -> None:
    tokens, width, vocabulary, tile = 640, 4, 300, 32
    hidden, weight, labels, _ = make(1, tokens, width, vocabulary, 5, False)
    low = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    with Sizes() as seen:
        tiled_loss(*low, labels.clamp(min=0), softcap=softcap, tile=tile).backward()
    assert seen.largest == tile * vocabulary  # and T · D, V · D are smaller here
    with Sizes() as seen, torch.no_grad():
        tiled_loss(*low, labels.clamp(min=0), softcap=softcap, tile=tile)
    assert seen.largest == tile * vocabulary


def test_without_gradients_nothing_is_saved() -> None:
    hidden, weight, labels, _ = make(1, 9, 4, 7, 6, False)
    with torch.no_grad():
        loss = tiled_loss(hidden, weight, labels.clamp(min=0))
    assert not loss.requires_grad


def test_a_second_backward_is_an_error() -> None:
    hidden, weight, labels, _ = make(1, 9, 4, 7, 7, False)
    loss = tiled_loss(hidden, weight, labels.clamp(min=0))
    loss.backward(retain_graph=True)
    with pytest.raises(ModelError, match="backward twice"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(7, 5)}, "equal D"),
        ({"labels": torch.zeros(1, 8, dtype=torch.int64)}, "one per token"),
        ({"labels": torch.zeros(1, 9)}, "int64"),
        ({"labels": torch.full((1, 9), 7)}, "in \\[0, 7\\).*there is a 7"),
        ({"labels": torch.full((1, 9), -1)}, "ignore_index=-100: there is a -1"),
        ({"bias": torch.zeros(6)}, "needs \\(7,\\)"),
        ({"softcap": 0.0}, "above 0"),
        ({"z_loss": -1.0}, "at least 0"),
        ({"z_loss": float("nan")}, "at least 0"),
        ({"tile": 0}, "positive number"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    good = {"hidden": torch.zeros(1, 9, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(1, 9, dtype=torch.int64)}
    with pytest.raises(ModelError, match=message):
        tiled_loss(**{**good, **change})


def test_the_package_exports_it() -> None:
    assert longctx.nn.tiled_loss is tiled_loss

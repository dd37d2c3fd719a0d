"""Whole tiles read through tensor descriptors, as sm_90's path does: the same numbers to the bit, and the portable path
for tensors that a descriptor cannot hold. tests/kernels/test_flash_triton.py draws rings on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longctx import LongctxError, block_attention, ring_attention
from longctx.attention.backends.choose import choose_backend
from longctx.attention.scores import Scores
from longctx.kernels.flash import fused, tiles
from longctx.kernels.flash.launch import Launch


def tensors(length: int, dim: int, wide: int, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    """q, k, v with shared key heads and d_v != d_k."""
    g = torch.Generator().manual_seed(0)
    shapes = (2, 2, length, dim), (2, 1, length, dim), (2, 1, length, wide)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def results(backend: str, inputs: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
    out, lse = ring_attention(*inputs, backend=backend, return_lse=True, **options)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    return (out, lse, *torch.autograd.grad(out.float().square().sum() + finite.sum(), inputs))


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every launch, whether it read through descriptors."""
    seen: list[bool] = []
    run = Launch._start

    def look(self: Launch) -> None:
        seen.append(bool(self.arguments.get("DESCRIBED")))
        run(self)

    monkeypatch.setattr(Launch, "_start", look)
    return seen


@pytest.mark.parametrize(
    ("length", "dims", "options"),
    [
        (64, (16, 16), {}),
        (50, (40, 24), {"causal": False, "length": 41}),
        (64, (16, 32), {"window": 40, "softcap": 2.0, "dropout_p": 0.3, "dropout_seed": 1}),
    ],
)
def test_the_same_to_the_bit(
    length: int, dims: tuple[int, int], options: dict[str, Any], described: list[bool]
) -> None:
    inputs = tensors(length, *dims)
    plain = results("triton", inputs, **options)
    assert not any(described)
    through = results("triton-tma", inputs, **options)
    assert sum(described) == 3, "forward, dQ, dK/dV"
    assert all(torch.equal(a, b) for a, b in zip(through, plain, strict=True))


def test_documents(described: list[bool]) -> None:
    inputs, ids = tensors(72, 16, 16), (torch.arange(72) // 40).expand(2, -1)
    plain, through = (results(name, inputs, document_ids=ids) for name in ("triton", "triton-tma"))
    assert sum(described) == 3
    assert all(torch.equal(a, b) for a, b in zip(through, plain, strict=True))


def test_what_no_descriptor_can_hold_goes_the_portable_way(described: list[bool]) -> None:
    """Rows of 10 bytes, and a beginning that is no multiple of 16 bytes."""
    thin = tensors(34, 5, 5)
    spare = [torch.nn.functional.pad(x.detach().flatten(), (1, 0))[1:].view(x.shape) for x in tensors(34, 16, 16)]
    for inputs in (thin, [x.requires_grad_() for x in spare]):
        described.clear()
        plain, through = (results(name, inputs) for name in ("triton", "triton-tma"))
        assert not any(described)
        assert all(torch.equal(a, b) for a, b in zip(through, plain, strict=True))


def test_any_layout_in_memory(described: list[bool]) -> None:
    """Heads inside tokens, as a projection leaves them; one head, whose stride may be anything."""
    inside = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors(34, 16, 16)]
    assert fused.describable(inside[0]) and not inside[0].is_contiguous()
    single = [x.detach()[:1, :1].as_strided((1, 1, 34, 16), (3, 5, 16, 1)).requires_grad_() for x in inside]
    for inputs in (inside, single):
        plain, through = (results(name, inputs) for name in ("triton", "triton-tma"))
        assert all(torch.equal(a, b) for a, b in zip(through, plain, strict=True))
    assert sum(described) == 6


def test_only_where_sm_90_has_a_row() -> None:
    for width in (64, 128, 256):
        for name in tiles.PASSES:
            for arch in tiles.ARCHES:
                asked = (name, width, 2, False, arch)
                row = tiles.choose_hopper(*asked)
                assert row.described == (arch == "sm_90" and (name, width) != ("keys", 256))
                assert row.described or row == tiles.choose(*asked)
    assert tiles.choose_hopper("forward", 128, 4, False, "sm_90") == tiles.choose("forward", 128, 4, False, "sm_90")
    assert tiles.choose_hopper("forward", 128, 2, True, "sm_90") == tiles.choose("forward", 128, 2, True, "sm_90")


def test_refused_by_name_where_there_is_no_copy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(8, 16, 16)
    with pytest.raises(LongctxError, match="float64"):
        block_attention(q.double(), k.double(), v.double(), backend="triton-tma")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(LongctxError, match="GPU"):
        choose_backend("triton-tma", q, v, Scores(1.0))

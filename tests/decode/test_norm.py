"""Norms of keys, against torch's modules and keys computed in full."""

from __future__ import annotations

import pytest
import torch
from decode.test_el import assert_equal
from torch.nn import functional

from longctx.decode.norm import Norm, key_scales

F64 = torch.float64


def test_a_norm_is_torchs() -> None:
    x, weight, bias = (torch.randn(*shape, dtype=F64) for shape in ((2, 3, 4, 6), (6,), (6,)))
    assert_equal(Norm("rms", weight, eps=1e-3)(x), functional.rms_norm(x, (6,), weight, 1e-3))
    assert_equal(Norm("layer", weight, bias, 1e-3)(x), functional.layer_norm(x, (6,), weight, bias, 1e-3))
    per_head = torch.randn(4, 6, dtype=F64)
    assert_equal(Norm("layer", per_head)(x)[:, :, 1], functional.layer_norm(x[:, :, 1], (6,), per_head[1], None, 1e-6))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_one_number_per_key_and_head_is_the_whole_division(kind: str) -> None:
    """norm(k_j) = r_j * centre(W_k h_j + b_k) * gamma + beta."""
    hidden, w_k, b_k = (torch.randn(*shape, dtype=F64) for shape in ((2, 5, 7), (8, 7), (8,)))
    norm = Norm(kind, torch.randn(4, dtype=F64), torch.randn(4, dtype=F64))  # type: ignore[arg-type]
    keys = functional.linear(hidden, w_k, b_k).unflatten(-1, (2, 4))
    r = key_scales(hidden, w_k, b_k, 2, norm)
    assert r.shape == (2, 5, 2)
    assert_equal(r[..., None] * norm.centre(keys) * norm.weight + norm.bias, norm(keys))


def test_scales_of_half_precision_are_fp32() -> None:
    """Squares of fp16 overflow above 256."""
    x = torch.full((1, 2, 8), 400.0).half()
    scales = key_scales(x, torch.eye(8).half(), None, 1, Norm())
    assert scales.dtype == torch.float32 and torch.allclose(scales, torch.tensor(1 / 400.0))

"""Arguments that do not fit together are rejected with an error that names them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from longctx import block_attention
from longctx.attention.arguments import resolve_scale, resolve_seeds, wrapped
from longctx.errors import LongctxError


def test_scale() -> None:
    q = torch.empty(1, 1, 1, 16)
    assert resolve_scale(None, q) == 0.25
    assert [resolve_scale(x, q) for x in (0, -2, 3.5)] == [0.0, -2.0, 3.5]


def test_seeds_are_one_per_row_and_none_without_dropout() -> None:
    q = torch.empty(3, 1, 1, 1)
    assert resolve_seeds(q, 0.0, 5) is None and resolve_seeds(q, 0.5, None) is None
    given = torch.tensor([4, 5, 6])
    assert resolve_seeds(q, 0.5, given) is given
    seeds = resolve_seeds(q, 0.5, -1)
    assert seeds is not None and seeds.dtype == torch.int64 and seeds[0] == -1 and len(set(seeds.tolist())) == 3


@pytest.mark.parametrize("x", [0, -1, 2**63, 2**63 - 1, -(2**63) - 1, 2**200 + 7])
def test_wrapped_keeps_the_lower_64_bits(x: int) -> None:
    assert -(2**63) <= wrapped(x) < 2**63 and (wrapped(x) - x) % 2**64 == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 0.0}, "softcap"),
        ({"scale": math.nan}, "scale=nan: give a finite number"),
        ({"scale": -math.inf}, "scale=-inf: give a finite number"),
        ({"sink": torch.zeros(3)}, "sink"),
        ({"alibi": torch.zeros(2, 4)}, "alibi"),
        ({"alibi": torch.zeros(4, dtype=torch.int64)}, "alibi"),
        ({"dropout_p": 0.1}, "dropout_seed"),
        ({"dropout_p": 1.0, "dropout_seed": 0}, "dropout_p"),
        ({"dropout_p": 0.1, "dropout_seed": torch.zeros(3, dtype=torch.int64)}, "dropout_seed"),
        ({"dropout_p": 0.1, "dropout_seed": torch.zeros(2)}, "dropout_seed"),
        ({"backend": "aten", "softcap": 30.0}, "aten.*softcap"),
        ({"backend": "aten", "alibi": torch.zeros(4)}, "aten.*alibi"),
        ({"backend": "aten", "dropout_p": 0.1, "dropout_seed": 0}, "aten.*dropout_p"),
        ({"backend": "cuda"}, "unknown"),
        ({"window": 0}, "window"),
        ({"document_ids": torch.zeros(2, 5)}, "document_ids"),
        ({"document_ids": torch.zeros(2, 4, dtype=torch.int64)}, "document_ids"),
        ({"q": torch.randn(2, 4, 5, 7)}, "last dimension"),
        ({"q": torch.randn(2, 3, 5, 8)}, "divide"),
        ({"q": torch.randn(4, 5, 8)}, "expected q"),
        ({"k": torch.randn(2, 2, 0, 8), "v": torch.randn(2, 2, 0, 8)}, "empty"),
        ({"k": torch.randn(2, 2, 5, 8).double()}, "dtype"),
        ({"v": torch.randn(2, 2, 4, 8)}, "agree"),
    ],
)
def test_errors_name_what_is_wrong(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 4, 5, 8),
        "k": torch.randn(2, 2, 5, 8),
        "v": torch.randn(2, 2, 5, 8),
    }
    with pytest.raises(LongctxError, match=message):
        block_attention(**{**arguments, **change})

"""SequenceInputs: slices of the tokens, single documents, padding, and the state of all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from bounded.sums import Sums, expected, sums


@dataclass(frozen=True)
class WithLogits(Sums):
    per_token: ClassVar[tuple[str, ...]] = ("q", "k", "v", "logits", "absent")

    logits: torch.Tensor
    absent: torch.Tensor | None = None
    setting: str = ""


def test_slices_keep_settings_and_cut_what_has_tokens() -> None:
    plain = sums(2, 9, 9)
    x = WithLogits(plain.q, plain.k, plain.v, torch.randn(2, 2, 9, 5), None, "kept")
    part = x.part(slice(3, 7))
    assert part.q.equal(x.q[:, :, 3:7]) and part.logits.equal(x.logits[:, :, 3:7])
    document = x.document(1, torch.tensor([8, 0, 4]))
    assert document.k.equal(x.k[1:, :, [8, 0, 4]]) and document.logits.equal(x.logits[1:, :, [8, 0, 4]])
    assert part.setting == document.setting == "kept" and part.absent is None


def test_queries_at_padding_are_cleared_whatever_they_hold() -> None:
    x = sums(1, 4, 4)
    x.q[:, :, 1] = torch.nan
    valid = torch.tensor([[True, False, True, True]])
    cleared = x.clear_queries(valid)
    assert cleared.q.equal(x.q.nan_to_num(0.0)) and cleared.v is x.v
    assert x.clear_queries(None) is x


def test_attend_all_reads_the_state_of_every_token() -> None:
    x = sums(2, 3, 6)
    assert x.attend_all().allclose(expected(x, torch.ones(1, 3, 6)))


@pytest.mark.parametrize(
    ("dtype", "accumulator"), [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2]
)
def test_states_are_at_least_fp32(dtype: torch.dtype, accumulator: torch.dtype) -> None:
    assert Sums(*(torch.zeros(1, 2, 3, 1, dtype=dtype) for _ in range(3))).dtype == accumulator

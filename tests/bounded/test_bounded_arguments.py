"""Arguments of both operators: which backend computes a call, and the errors of what does not fit together."""

from __future__ import annotations

import pytest
import torch

from longctx.attention.comm import LocalLink
from longctx.bounded.arguments import (
    SequenceCall,
    check_backend,
    check_ids,
    check_logits,
    check_state,
    choose_backend,
)
from longctx.bounded.state import ABCState, CosineState
from longctx.errors import AttentionError

K = torch.zeros(2, 2, 6, 4)
STATE = CosineState(torch.zeros(2, 2, 4, 4), torch.zeros(2).long())


def test_the_backend_follows_device_and_dtype() -> None:
    assert choose_backend("auto", K, K) == choose_backend("chunked", K, K) == "chunked"
    assert choose_backend("triton", K, K) == "triton"  # interpreted, in tests
    with pytest.raises(AttentionError, match="only in red; use 'auto' or 'chunked'"):
        choose_backend("triton", K, K, "only in red")
    with pytest.raises(AttentionError, match="use one of 'auto', 'chunked', 'triton'"):
        check_backend("aten")


def test_ids_and_numbers_of_queries() -> None:
    ids = torch.zeros(2, 6, dtype=torch.int64)
    check_ids(ids, K, K, True)
    check_ids(ids, K[:, :, :3], K, False)
    with pytest.raises(AttentionError, match="3 queries and 6 keys"):
        check_ids(None, K[:, :, :3], K, True)
    with pytest.raises(AttentionError, match="document_ids"):
        check_ids(ids[:, :5], K, K, True)


@pytest.mark.parametrize(
    "s", [K[0], torch.zeros(2, 2, 5, 3), torch.zeros(2, 2, 6, 0), torch.zeros(2, 2, 6, 3, dtype=torch.int64)]
)
def test_logits_are_per_token_and_slot(s: torch.Tensor) -> None:
    check_logits("control", torch.zeros(2, 2, 6, 3), K)
    check_logits("control", None, K)
    with pytest.raises(AttentionError, match="one per token and slot"):
        check_logits("control", s, K)
    with pytest.raises(AttentionError, match="on meta, but the keys are on cpu"):
        check_logits("control", torch.zeros(2, 2, 6, 3, device="meta"), K)


def test_states_fit_the_call() -> None:
    plain = SequenceCall(link=LocalLink())
    packed = SequenceCall(link=LocalLink(), document_ids=torch.zeros(2, 6, dtype=torch.int64))
    check_state(STATE, plain.locate(K), CosineState, 2)
    check_state(None, packed.locate(K), CosineState, 2)
    for message, call, kind, batch in (
        ("expected ABCState", plain, ABCState, 2),
        ("state of 2 rows, and the batch has 3", plain, CosineState, 3),
        ("pass document_ids from the first call on", packed, CosineState, 2),
    ):
        with pytest.raises(AttentionError, match=message):
            check_state(STATE, call.locate(K), kind, batch)


def test_calls_with_a_state() -> None:
    assert SequenceCall(state=STATE).with_state and SequenceCall(return_state=True).with_state
    assert not SequenceCall().with_state

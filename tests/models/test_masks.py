"""What the mask function reads from transformers' closures equals what they evaluate to, and costs one number a key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import masking_utils as hf

from longctx.errors import ModelError
from longctx.models.hook.masks import document_ids_as_mask, documents_from_positions, read_rule

LENGTH = 14
POSITIONS = torch.tensor([[*range(5), *range(9)], [*range(8), *range(6)]])


def packed(rule: Any, positions: torch.Tensor = POSITIONS) -> Any:
    ids = hf.find_packed_sequence_indices(positions)
    if hasattr(hf, "packed_sequence_compatibility_function"):  # newer transformers
        return hf.packed_sequence_compatibility_function(rule, positions, ids)
    return hf.and_masks(rule, hf.packed_sequence_mask_function(ids))


RULES = {
    "causal": hf.causal_mask_function,
    "full": hf.bidirectional_mask_function,
    "window": hf.sliding_window_causal_mask_function(4),
    "window both ways": hf.sliding_window_bidirectional_mask_function(4),
    "packed": packed(hf.causal_mask_function),
    "packed window": packed(hf.sliding_window_causal_mask_function(3)),
}


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("padded", [False, True])
def test_the_rule_read_is_the_rule_evaluated(name: str, padded: bool) -> None:
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    if padded:
        padding[0, :3], padding[1, -2:] = False, False
    truth = hf.sdpa_mask(
        2, LENGTH, LENGTH, mask_function=RULES[name], attention_mask=padding, allow_is_causal_skip=False
    )
    mask = document_ids_as_mask(
        2, LENGTH, LENGTH, mask_function=RULES[name], attention_mask=padding if padded else None
    )
    rule = read_rule(RULES[name])
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    if rule.causal:
        allowed &= distance >= 0
    if rule.window is not None:
        allowed &= distance.abs() < rule.window
    ids = mask[:, 0, 0].expand(2, LENGTH)
    seen = allowed & (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, None, :]
    valid = padding[:, :, None].expand_as(seen)  # what a padded query sees is nobody's business
    assert torch.equal(seen[valid], truth[:, 0][valid])


def test_nothing_quadratic_is_built() -> None:
    length = 1_000_000  # a T x T mask of booleans would be a terabyte
    positions = torch.arange(length)[None] % 1000
    rule = packed(hf.causal_mask_function, positions)
    mask = document_ids_as_mask(1, length, length, mask_function=rule)
    assert mask.shape == (1, 1, 1, length) and mask.dtype == torch.int32
    assert int(mask.max()) == 999
    assert document_ids_as_mask(1, length, length, mask_function=hf.causal_mask_function).shape == (1, 1, 1, 1)


def test_documents_start_where_positions_do() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [5, 6, 7, 8, 9, 10, 11]])
    assert documents_from_positions(positions).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7]
    assert documents_from_positions(positions).dtype == torch.int32


@pytest.mark.parametrize(
    "rule, name",
    [
        (hf.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)), "chunked_overlay"),
        (hf.or_masks(hf.causal_mask_function, hf.bidirectional_mask_function), "or_masks"),
        (hf.and_masks(hf.causal_mask_function, lambda b, h, q, k: q == k), "<lambda>|test_masks"),
    ],
)
def test_other_rules_are_refused_by_name(rule: Any, name: str) -> None:
    with pytest.raises(ModelError, match=name):
        document_ids_as_mask(2, LENGTH, LENGTH, mask_function=rule)


def test_a_mask_of_the_models_own_is_refused() -> None:
    with pytest.raises(ModelError, match="or_mask_function"):
        document_ids_as_mask(2, LENGTH, LENGTH, mask_function=hf.causal_mask_function, use_vmap=True)

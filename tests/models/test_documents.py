"""Documents of an attention call come from the right keyword, with padding as -1."""

from __future__ import annotations

import pytest
import torch

from longctx.errors import ModelError
from longctx.models.hook.documents import padded_tokens, sharded_documents, whole_documents

MODULE = torch.nn.Identity()
QUERY = torch.zeros(2, 4, 6, 8)
IDS = torch.tensor([[0, 0, 0, 1, 1, 1]])


def mask(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)[:, None, None]


def test_a_shard_needs_document_ids_and_takes_padding_from_the_mask() -> None:
    with pytest.raises(ModelError, match="without document_ids"):
        sharded_documents(MODULE, QUERY, QUERY, None, None)
    with pytest.raises(ModelError, match="6 queries and 5 keys"):
        sharded_documents(MODULE, QUERY, QUERY[:, :, :5], None, IDS)
    with pytest.raises(ModelError, match=r"document_ids has shape \(3, 6\); these tokens need \(2, 6\)"):
        sharded_documents(MODULE, QUERY, QUERY, None, IDS.expand(3, -1))
    padding = mask([0] * 6, [-1, -1, 0, 0, 0, 0])
    found = sharded_documents(MODULE, QUERY, QUERY, padding, IDS)
    assert found.tolist() == [[0, 0, 0, 1, 1, 1], [-1, -1, 0, 1, 1, 1]] and found.dtype == torch.int32


def test_a_whole_sequence_prefers_ids_then_positions_then_the_mask() -> None:
    positions = torch.tensor([[0, 1, 0, 1, 2, 3]])
    seen = mask([0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, -1])
    by_ids = whole_documents(QUERY, seen, IDS, positions)
    by_positions = whole_documents(QUERY, seen, None, positions)
    by_mask = whole_documents(QUERY, seen, None, None)
    assert by_ids is not None and by_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, -1]]
    assert by_positions is not None and by_positions.tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, -1]]
    assert by_mask is not None and by_mask.tolist() == seen[:, 0, 0].tolist()


def test_one_document_without_padding_needs_no_ids() -> None:
    assert whole_documents(QUERY, None, None, None) is None
    assert whole_documents(QUERY, None, torch.zeros(1, 6, dtype=torch.int32), None) is None


def test_padding_is_known_only_from_a_mask_of_the_querys_length() -> None:
    found = padded_tokens(mask([0, 0, 0, 0, -1, -1]), QUERY)
    assert found is not None and found.tolist() == [[True] * 4 + [False] * 2] * 2
    assert padded_tokens(mask([0] * 7), QUERY) is None and padded_tokens(None, QUERY) is None

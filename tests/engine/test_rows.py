"""Documents, positions and shifted labels are found on whole rows, whatever a loader gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longctx.engine.step.rows import explicit_rows, find_documents, shift_labels
from longctx.errors import EngineError, ModelError
from longctx.models.hook.positions import PositionRule


def rows(**keys: torch.Tensor) -> dict[str, torch.Tensor]:
    return explicit_rows({"input_ids": torch.arange(12).reshape(2, 6), **keys})


def test_a_plain_row_is_one_document_with_positions_from_zero() -> None:
    batch = rows(labels=torch.arange(12).reshape(2, 6))
    assert batch["document_ids"].tolist() == [[0] * 6] * 2
    assert batch["document_ids"].dtype == torch.int32
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert batch["shift_labels"].tolist() == [[1, 2, 3, 4, 5, -100], [7, 8, 9, 10, 11, -100]]
    assert "labels" not in batch and "attention_mask" not in batch


def test_documents_begin_where_positions_restart_and_their_last_token_predicts_nothing() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 2]])
    batch = rows(position_ids=positions, labels=torch.arange(12).reshape(2, 6))
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 2, 2]]
    assert batch["position_ids"].tolist() == positions.tolist()
    assert batch["shift_labels"].tolist() == [[1, 2, -100, 4, 5, -100], [7, -100, -100, 10, 11, -100]]


def test_padding_on_either_side_is_nobodys_document() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    batch = rows(attention_mask=mask, labels=torch.arange(12).reshape(2, 6))
    assert batch["document_ids"].tolist() == [[-1, -1, 0, 0, 0, 0], [0, 0, 0, 0, -1, -1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2  # what transformers does by itself
    assert batch["shift_labels"].tolist() == [[-100, -100, 3, 4, 5, -100], [7, 8, 9, -100, -100, -100]]


def test_left_padding_with_explicit_positions_is_one_document() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    documents = find_documents(1, 6, None, torch.tensor([[1, 1, 0, 1, 2, 3]]), mask)
    assert documents.tolist() == [[-1, -1, 0, 0, 0, 0]]


def test_a_document_goes_on_behind_a_masked_stretch() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    goes_on = [[0, 0, -1, -1, 0, 0]]
    assert find_documents(1, 6, None, None, mask).tolist() == goes_on
    for positions in ([0, 1, 2, 3, 4, 5], [0, 1, 1, 1, 2, 3]):  # padding counted, or not
        assert find_documents(1, 6, None, torch.tensor([positions]), mask).tolist() == goes_on
    restarted = find_documents(1, 6, None, torch.tensor([[0, 1, 0, 0, 0, 1]]), mask)
    assert restarted.tolist() == [[0, 0, -1, -1, 1, 1]]
    batch = rows(document_ids=torch.tensor([[4, 4, -1, 4, 6, 6]]), labels=torch.arange(12).reshape(2, 6))
    assert batch["document_ids"].tolist() == [[4, 4, -1, 4, 6, 6]] * 2
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    assert batch["shift_labels"][0].tolist() == [1, -100, -100, -100, 5, -100]


def test_an_id_that_comes_back_is_another_document() -> None:
    batch = rows(document_ids=torch.tensor([[5, 5, 3, 3, 5, 5], [5, 5, 5, 3, -1, 3]]))
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1, 2, 2], [5, 5, 5, 3, -1, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2]]


def test_padding_repeats_a_token_of_its_row() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [0] * 6])
    batch = rows(attention_mask=mask)
    assert batch["input_ids"].tolist() == [[2, 2, 2, 3, 2, 5], [2] * 6]
    x = torch.randn(2, 6, 4, requires_grad=True)
    filled = explicit_rows({"inputs_embeds": x, "attention_mask": mask})["inputs_embeds"]
    assert torch.equal(filled[0, 4], x[0, 2])
    filled[0].sum().backward()
    assert x.grad is not None and x.grad[0].sum(-1).tolist() == [0.0, 0.0, 4.0, 4.0, 0.0, 4.0]


def test_positions_are_counted_as_the_model_counts_them() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0, 1]])
    tokens = torch.tensor([[1, 1, 7, 8, 1, 9]])

    def counted(**keys: Any) -> list[list[int]]:
        rule = keys.pop("rule")
        found: list[list[int]] = explicit_rows({"input_ids": tokens, **keys}, rule)["position_ids"].tolist()
        return found

    assert counted(rule=PositionRule("index", 2), attention_mask=mask) == [[2, 3, 4, 5, 6, 7]]
    assert counted(rule=PositionRule("mask"), attention_mask=mask) == [[0, 0, 0, 1, 0, 2]]
    assert counted(rule=PositionRule("tokens", 2, 1), attention_mask=mask) == [[1, 1, 2, 3, 1, 4]]
    packed = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert counted(rule=PositionRule("tokens", 2, 1), document_ids=packed) == [[1, 1, 2, 2, 1, 3]]
    assert counted(rule=PositionRule("mask", 3), document_ids=packed) == [[3, 4, 5, 3, 4, 5]]
    with pytest.raises(ModelError, match="counts positions from 2.*document_ids"):
        counted(rule=PositionRule("tokens", 2, 1), position_ids=torch.arange(6))


def test_given_document_ids_are_kept_and_positions_restart() -> None:
    documents = torch.tensor([[7, 7, 9, 9, 9, -3], [1, 1, 1, 1, 1, 1]])
    batch = rows(document_ids=documents)
    assert batch["document_ids"].tolist() == [[7, 7, 9, 9, 9, -1], [1] * 6]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert "shift_labels" not in batch


def test_shifted_labels_are_taken_as_they_are() -> None:
    labels = torch.arange(12).reshape(2, 6)
    batch = rows(shift_labels=labels, attention_mask=torch.tensor([[1] * 6, [1] * 5 + [0]]))
    assert batch["shift_labels"].tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, -100]]


def test_one_row_of_positions_serves_all() -> None:
    assert rows(position_ids=torch.arange(6))["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_shifting_loses_no_token_within_a_document() -> None:
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(0, 2, (3, 50), generator=generator).cumsum(1)
    labels = torch.randint(0, 99, (3, 50), generator=generator)
    shifted = shift_labels(labels, documents)
    runs = 3 + int((documents[:, 1:] != documents[:, :-1]).sum())
    assert int((shifted >= 0).sum()) == 150 - runs


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask is .*document_ids"),
        ({"attention_mask": torch.full((2, 6), 3)}, "value 3"),
        ({"labels": torch.zeros(2, 5, dtype=torch.long)}, "labels is"),
        ({"position_ids": torch.zeros(3, 2, 6, dtype=torch.long)}, "position_ids is"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 12])}, "cu_seq_lens_q"),
        ({"inputs_embeds": torch.zeros(2, 6, 4)}, "exactly one"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name(keys: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        rows(**keys)  # type: ignore[arg-type]


def test_a_batch_without_tokens_is_refused() -> None:
    with pytest.raises(EngineError, match="exactly one"):
        explicit_rows({"pixel_values": torch.zeros(1)})
    with pytest.raises(EngineError, match="non-empty"):
        explicit_rows({"input_ids": torch.zeros(1, 0, dtype=torch.long)})

"""Positions are counted by a model's rule, per document or along the row."""

from __future__ import annotations

import pytest
import torch

from longctx.errors import ModelError
from longctx.models.hook.positions import PLAIN, PositionRule, check_positions, count_positions, table_of_positions

IDS = torch.tensor([[-1, 0, 0, -1, 0, 1, 1, -1]])  # padding before, inside and after documents
TOKENS = torch.tensor([[9, 5, 5, 9, 5, 5, 9, 9]])


@pytest.mark.parametrize(
    ("rule", "restart", "wanted"),
    [
        (PLAIN, False, [0, 1, 2, 3, 4, 5, 6, 7]),
        (PLAIN, True, [0, 0, 1, 2, 3, 0, 1, 0]),
        (PositionRule("index", 2), True, [2, 2, 3, 4, 5, 2, 3, 2]),
        (PositionRule("mask", 2), True, [1, 2, 3, 1, 4, 2, 3, 1]),
        (PositionRule("mask"), False, [0, 0, 1, 0, 2, 3, 4, 0]),
        (PositionRule("tokens", 2, 9), False, [1, 2, 3, 1, 4, 5, 1, 1]),
        (PositionRule("tokens", 2, 9), True, [1, 2, 3, 1, 4, 2, 1, 1]),
    ],
)
def test_positions_are_counted_by_the_rule(rule: PositionRule, restart: bool, wanted: list[int]) -> None:
    assert count_positions(IDS, rule, TOKENS, restart=restart).tolist() == [wanted]


def test_embeddings_have_no_pad_token_to_skip() -> None:
    rule = PositionRule("tokens", 2, 9)
    assert count_positions(IDS, rule, None, restart=False).tolist() == [list(range(2, 10))]


def test_positions_below_the_first_one_are_refused_except_at_padding() -> None:
    rule = PositionRule("index", 2)
    check_positions(torch.tensor([[0, 2, 3, 0, 4, 2, 3, 0]]), IDS, rule)
    check_positions(torch.zeros_like(IDS), IDS, PLAIN)
    with pytest.raises(ModelError, match="position_ids hold 1, but this model counts positions from 2"):
        check_positions(torch.tensor([[0, 1, 2, 0, 3, 2, 3, 0]]), IDS, rule)


def test_the_table_of_positions_bounds_a_row() -> None:
    class Reserved(torch.nn.Embedding):
        offset = 2

    model = torch.nn.ModuleDict({"wpe": torch.nn.Embedding(32, 4), "other": torch.nn.Embedding(8, 4)})
    assert table_of_positions(model) == 32
    assert table_of_positions(torch.nn.ModuleDict({"embed_positions": Reserved(34, 4)})) == 32
    assert table_of_positions(torch.nn.Linear(2, 2)) is None

"""States are tensors by row: selected, detached and counted field by field, absent fields included."""

from __future__ import annotations

import pytest
import torch

from longctx.bounded.state import ABCState, CosineState, FifoState, State

MASS, KEYS, VALUES, COUNT = torch.randn(3, 2, 4), torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 6), torch.arange(3)
STATES = {
    "abc": ABCState(MASS, KEYS, VALUES),
    "abc of documents": ABCState(MASS, KEYS, VALUES, COUNT, None, COUNT + 4),
    "cosine": CosineState(torch.randn(3, 2, 5, 6), COUNT, COUNT),
    "queue": FifoState(KEYS, VALUES, torch.zeros(3, 4).long(), torch.arange(12).view(3, 4)),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_rows_are_selected_in_order(state: State) -> None:
    chosen = state.select(torch.tensor([2, 0, 0, 1]))
    assert type(chosen) is type(state) and (state.rows, chosen.rows) == (3, 4)
    for name, x in vars(state).items():
        assert getattr(chosen, name) is None if x is None else getattr(chosen, name).equal(x[[2, 0, 0, 1]])


@pytest.mark.parametrize(
    ("name", "numbers"), [("abc", 24 * 12), ("abc of documents", 24 * 12 + 12), ("cosine", 180 + 12)]
)
def test_bytes_are_those_of_all_tensors(name: str, numbers: int) -> None:
    assert STATES[name].nbytes == 4 * numbers


def test_detach_cuts_every_field_from_the_graph() -> None:
    state = CosineState(torch.randn(3, 2, 5, 6, requires_grad=True) * 2, torch.arange(3))
    assert state.memory.requires_grad and not state.detach().memory.requires_grad
    assert state.detach().memory.equal(state.memory)

"""Every control and form of ABC and Cottention: a sequence in parts equals the whole, and padding changes nothing."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from bounded import direct, ranks
from bounded.inputs import PACKED
from bounded.ring_states import cut

from longctx.bounded.abc import clusters

CAUSAL = [name for name, case in ranks.CASES.items() if case.causal]
SPLITS = [[1] * 37, [5, 1, 20, 11], [36, 1]]
HOLES = direct.packed(
    [[(3, 4), (-1, 3), (3, 9), (-1, 8), (3, 2), (4, 2), (-1, 2), (4, 7)], [(-1, 2), (1, 1), (-1, 30), (1, 4)]]
)
"""Padding inside documents, longer than a queue, and at both ends of parts."""


@pytest.fixture(autouse=True)
def centroids_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Update centroids within sequences as short as these."""
    monkeypatch.setattr(clusters, "PERIOD", 5)


def inputs(name: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    leaves, weight = ranks.inputs(name, 37)
    return [x.requires_grad_() for x in leaves], weight


def in_parts(name: str, leaves: list[torch.Tensor], ids: torch.Tensor | None, sizes: list[int]) -> tuple[Any, Any]:
    """Return the output, and the state after the last part; states do not grow."""
    state, outs, nbytes = None, [], set()
    for part in torch.arange(37).split(sizes):
        here = slice(int(part[0]), int(part[-1]) + 1)
        own = None if ids is None else ids[:, here]
        out, state = ranks.call(name, cut(name, leaves, here), own, "zigzag", None, state=state, return_state=True)
        outs.append(out)
        nbytes.add(state.nbytes)
    assert len(nbytes) == 1
    return torch.cat(outs, 2), state


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_parts_with_the_state_carried_equal_the_whole(name: str, packed: bool) -> None:
    leaves, weight = inputs(name)
    ids = PACKED if packed else None
    expected, last = ranks.call(name, leaves, ids, "zigzag", None, return_state=True)
    for sizes in SPLITS:
        ours, state = in_parts(name, leaves, ids, sizes)
        direct.check(ours, expected, weight, leaves)
        for field in fields(last):
            a, b = getattr(state, field.name), getattr(last, field.name)
            assert (a is None) == (b is None), field.name
            if a is not None and a.is_floating_point() and name != "cluster":  # its sums may wait for an update
                assert a.isfinite().equal(b.isfinite())
                assert direct.differences([a.nan_to_num(neginf=0.0)], [b.nan_to_num(neginf=0.0)])[0] <= direct.EXACT
            elif a is not None and not a.is_floating_point():
                assert a.equal(b), field.name


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_inside_documents_takes_no_place(name: str) -> None:
    """Each row equals the same row without its padding, whole or in parts of any length."""
    leaves, weight = inputs(name)
    weight = weight.masked_fill((HOLES < 0)[:, None, :, None], 0.0)
    rows = []
    for row, ids in enumerate(HOLES):
        there = (ids >= 0).nonzero()[:, 0]
        own = [x[row : row + 1] if place < 3 or ranks.CASES[name].local else x for place, x in enumerate(leaves)]
        out = ranks.call(name, cut(name, own, there), ids[there][None], "zigzag", None)
        rows.append(torch.zeros(1, 4, 37, 3, dtype=torch.float64).index_copy(2, there, out))
    for sizes in ([37], *SPLITS[:2]):
        direct.check(in_parts(name, leaves, HOLES, sizes)[0], torch.cat(rows), weight, leaves)


@pytest.mark.parametrize("name", ranks.CASES)
def test_padding_changes_nothing_whatever_it_holds(name: str) -> None:
    leaves, weight = inputs(name)
    plain = ranks.call(name, leaves, None, "zigzag", None)
    wide = [
        torch.nn.functional.pad(x.detach(), (0, 0, 4, 6), value=torch.nan).requires_grad_()
        if place < 3 or ranks.CASES[name].local else x
        for place, x in enumerate(leaves)
    ]  # fmt: skip
    padded = ranks.call(name, wide, direct.packed([[(-1, 4), (3, 37), (-1, 6)]] * 2), "zigzag", None)
    tokens = slice(4, 41)
    assert not padded[:, :, :4].any() and not padded[:, :, 41:].any()
    found = direct.gradients(padded[:, :, tokens], weight, wide)
    assert all(x.isfinite().all() for x in found if x is not None)
    expected = [plain, *direct.gradients(plain, weight, leaves)]
    assert max(direct.differences([padded[:, :, tokens], *cut(name, found, tokens)], expected)) <= direct.EXACT

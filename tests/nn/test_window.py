"""The window mixer attends to the last tokens only, and its state holds just these."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bounded import direct
from bounded.inputs import PACKED, qkv

from longctx.errors import AttentionError
from longctx.nn.kinds import Window
from longctx.nn.window import WindowMixer

SIZE = 5
MIXER = WindowMixer(Window(SIZE))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ids", [None, PACKED])
def test_tokens_attend_to_a_window(causal: bool, ids: torch.Tensor | None) -> None:
    (q, k, v), weight, _ = qkv()
    distance = torch.arange(37)[:, None] - torch.arange(37)
    seen = direct.visible(37, ids, causal) & (distance.abs() < SIZE)
    out = MIXER(q, k, v, causal=causal, scale=0.7, document_ids=ids)
    direct.check(out, direct.queue(q, k, v, seen, 0.7, None), weight, [q, k, v])


@pytest.mark.parametrize("ids", [None, PACKED])
@pytest.mark.parametrize("sizes", [[37], [3, 1, 20, 13], [1] * 37])
def test_states_continue_and_hold_the_window(ids: torch.Tensor | None, sizes: list[int]) -> None:
    (q, k, v), weight, _ = qkv()
    state: Any = None
    outs = []
    for part in torch.arange(37).split(sizes):
        own = None if ids is None else ids[:, part]
        out, state = MIXER(
            *(x[:, :, part] for x in (q, k, v)), document_ids=own, state=state, return_state=True, scale=0.7
        )
        outs.append(out)
    direct.check(torch.cat(outs, 2), MIXER(q, k, v, document_ids=ids, scale=0.7), weight, [q, k, v])
    assert state.keys.equal(k[:, :, -SIZE + 1 :]) and state.values.equal(v[:, :, -SIZE + 1 :])
    assert state.documents.equal(torch.zeros(2, 4, dtype=torch.int64) if ids is None else ids[:, -SIZE + 1 :])
    assert state.keys.untyped_storage().nbytes() == state.keys.nbytes  # not a view of the whole sequence


def test_a_state_on_a_ring_is_refused() -> None:
    (q, k, v), *_ = qkv()
    _, state = MIXER(q, k, v, return_state=True)
    with pytest.raises(AttentionError, match="a state on a ring of ranks"):
        MIXER(q, k, v, state=state, mesh=SimpleNamespace(sequence_size=2))

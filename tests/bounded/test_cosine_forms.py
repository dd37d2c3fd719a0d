"""Cottention's forms read what their states hold, and both orders of the non-causal product are equal."""

from __future__ import annotations

import pytest
import torch
from bounded import direct
from bounded.inputs import of_cosine

from longctx.bounded.cosine import forms
from longctx.bounded.cosine.operator import cosine_attention
from longctx.bounded.ranks.sequence import locate

from tolerances import tolerance

EXACT = tolerance("fp64")
PADDED = direct.packed([[(-1, 4), (0, 33)], [(7, 30), (-1, 7)]])


def test_the_state_of_all_keys_is_that_of_its_parts() -> None:
    (q, k, v, m), *_ = of_cosine()
    x = forms.CosineInputs(q, k, v, m.sigmoid(), True, "chunked")
    none = torch.zeros(2, dtype=torch.int64)
    whole = x.write(PADDED >= 0, none)
    parts = [x.part(here).write(PADDED[:, here] >= 0, none) for here in (slice(0, 11), slice(11, 37))]
    assert max(direct.differences(list(x.combine(*parts)), list(whole))) <= EXACT
    assert whole[1].tolist() == [33, 30]
    seen = (PADDED >= 0)[:, None].expand(-1, 37, -1)
    assert direct.differences([x.read(whole)], [direct.cosine(q, k, v, m, seen, "query")])[0] <= EXACT


def test_causal_leaves_the_state_of_all_keys() -> None:
    (q, k, v, m), *_ = of_cosine()
    x = forms.CosineInputs(q, k, v, m.sigmoid(), True, "chunked")
    local = locate(37, 2, q.device, mesh=None, layout="contiguous", document_ids=PADDED, length=None)
    _, state = forms.causal(x, local, None, True)
    memory, count, _ = x.write(PADDED >= 0, torch.zeros(2, dtype=torch.int64))
    assert direct.differences([state.memory], [memory])[0] <= EXACT
    assert state.count.equal(count) and state.document is not None and state.document.tolist() == [0, 7]


def test_values_shrink_by_a_power_of_their_count() -> None:
    (q, k, v, _), *_ = of_cosine()
    x = forms.CosineInputs(q, k, v, torch.tensor([0.5, 1.0, 0.0, 2.0]).double(), True, "chunked")
    size = x.size(torch.tensor([[0, 1, 4]]))  # 0: padding before the first token, which is as 1
    wanted = torch.tensor([[1, 1, 0.5], [1, 1, 0.25], [1, 1, 1], [1, 1, 1 / 16]]).double()
    assert direct.differences([size[0]], [wanted])[0] <= EXACT


def test_both_orders_of_the_product_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, weight, _ = of_cosine()
    answers = []
    for pairs in (False, True):
        monkeypatch.setattr(forms, "_pairs_are_cheaper", lambda *_, pairs=pairs: pairs)
        out = cosine_attention(*leaves, causal=False)
        answers.append([out, *direct.gradients(out, weight, leaves)])
    assert max(direct.differences(*answers)) <= EXACT

"""ABC's forms: states of stretches combine, and the causal form leaves the state that the non-causal form reads."""

from __future__ import annotations

import pytest
import torch
from bounded import direct
from bounded.inputs import of_abc

from longctx.bounded.abc import forms
from longctx.bounded.abc.forms import ABCInputs
from longctx.bounded.abc.weights import Normalizer
from longctx.bounded.ranks.sequence import locate

from tolerances import tolerance

EXACT = tolerance("fp64")
SCALE = 0.7
PADDED = direct.packed([[(-1, 4), (0, 33)], [(7, 30), (-1, 7)]])
NONE = torch.zeros(2, dtype=torch.int64)


def make(normalizer: Normalizer, pair: bool) -> ABCInputs:
    (q, k, v, s_k, s_v), *_ = of_abc()
    return ABCInputs(q, k, v, s_k, s_v if pair else None, normalizer, SCALE)


both = pytest.mark.parametrize("pair", [False, True])


@both
@pytest.mark.parametrize("normalizer", [Normalizer.PREFIX, Normalizer.SUM])
def test_the_state_of_all_tokens_is_that_of_its_parts(normalizer: Normalizer, pair: bool) -> None:
    x = make(normalizer, pair)
    whole = x.write(PADDED >= 0, NONE)
    parts = [x.part(here).write(PADDED[:, here] >= 0, NONE) for here in (slice(0, 11), slice(11, 37))]
    assert max(direct.differences(list(x.combine(*parts)), list(whole))) <= EXACT
    seen = (PADDED >= 0)[:, None].expand(-1, 37, -1)
    expected = direct.abc(x.q, x.k, x.v, x.controls[0], x.controls[-1], seen, normalizer.value, SCALE)
    assert direct.differences([x.read(whole)], [expected])[0] <= EXACT
    again = forms.to_value(x.to_state(whole, None))
    assert all(a.equal(b) for a, b in zip(again, whole[:-1], strict=True))


@both
@pytest.mark.parametrize("normalizer", list(Normalizer))
def test_causal_leaves_the_state_of_all_tokens(normalizer: Normalizer, pair: bool) -> None:
    x = make(normalizer, pair)
    local = locate(37, 2, x.q.device, mesh=None, layout="contiguous", document_ids=PADDED, length=None)
    _, state = forms.causal(x, local, None, True)
    whole = x.to_state(x.write(PADDED >= 0, NONE), None)
    assert state.document is not None and state.document.tolist() == [0, 7]
    found, wanted = [state.log_mass, state.value_log_mass], [whole.log_mass, whole.value_log_mass]
    if normalizer != Normalizer.RUNNING:  # there weights depend on the order, and only the masses are the same
        found, wanted = [*found, state.keys, state.values], [*wanted, whole.keys, whole.values]
    assert max(direct.differences(found, wanted)) <= EXACT


@both
def test_over_all_tokens_continues_a_state(pair: bool) -> None:
    """The state of the first tokens, then the rest: every query reads all of them."""
    x = make(Normalizer.PREFIX, pair)
    first, rest = x.part(slice(0, 11)), x.part(slice(11, 37))
    before = x.to_state(first.write(None, NONE), None)
    local = locate(26, 2, x.q.device, mesh=None, layout="contiguous", document_ids=None, length=None)
    out, state = forms.over_all(rest, local, before)
    whole = x.write(None, NONE)
    assert direct.differences([out], [x.read(whole)[:, :, 11:]])[0] <= EXACT
    assert max(direct.differences(list(forms.to_value(state)), list(whole[:-1]))) <= EXACT


@both
def test_an_empty_state_reads_0(pair: bool) -> None:
    x = make(Normalizer.PREFIX, pair)
    empty = x.empty()
    assert (empty.log_mass == -torch.inf).all() and (empty.value_log_mass is not None) == pair
    assert not x.read((*forms.to_value(empty), NONE)).any()

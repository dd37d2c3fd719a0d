"""Non-causal attention: every query reads the state of all tokens of the sequence, on one device or a ring."""

from __future__ import annotations

from functools import reduce

import torch

from longctx.bounded.inputs import SequenceInputs
from longctx.bounded.ranks.exchange import Value, collect, one_per_rank
from longctx.bounded.ranks.sequence import LocalTokens, check_one_document, only_document


def over_all(x: SequenceInputs, local: LocalTokens, before: Value | None) -> tuple[torch.Tensor, Value]:
    """Return (out (B, H, T, Dv), the state of all tokens).

    Args:
        before: the state before the sequence, without its document, or None.

    Raises:
        AttentionError: the sequence holds several documents.
    """
    whole = x.write(local.valid, only_document(local.ids, x.k.shape[0], x.k.device))
    if local.link.ring > 1:
        whole = reduce(x.combine, _all_states(whole, local))
    if before is not None:
        whole = x.combine((*before, whole[-1]), whole)
    if local.valid is None or local.valid.shape[1] != x.q.shape[2]:  # in cross attention ids belong to the keys
        return x.read(whole), whole
    return x.clear_queries(local.valid).read(whole).masked_fill(~local.valid[:, None, :, None], 0.0), whole


def _all_states(own: Value, local: LocalTokens) -> list[Value]:
    """Exchange the ranks' states and return them in order."""
    link = local.link
    known, token = collect([own], link, one_per_rank(link.ring), lambda source, here: True)
    known[link.rank] = (own[0] + token, *own[1:])  # the token ties the output to the exchange, for its backward
    states = [known[rank] for rank in range(link.ring)]
    if local.ids is not None:
        check_one_document([state[-1] for state in states])
    return states

"""A simulated ring over a whole sequence: deal it out, run every rank's real passes, put the answers back in order."""

from __future__ import annotations

import torch
from attention import dense

from longctx.attention import simulate
from longctx.attention import sink as sinks
from longctx.attention.backends.base import BackwardQueries
from longctx.attention.backends.choose import choose_backend
from longctx.attention.band import Rule
from longctx.attention.comm import Counters, Link
from longctx.attention.passes import Passes, split
from longctx.attention.scores import Scores


def simulated(
    ring: int,
    layout: str,
    rule: Rule,
    inputs: tuple[torch.Tensor, ...],
    documents: torch.Tensor | None = None,
    scale: float = 0.5,
    backend: str = "aten",
    extras: dense.Extras = dense.PLAIN,
) -> tuple[dense.Results, list[Counters]]:
    """Forward and backward of (q, k, v, dout[, dlse]) over `ring` simulated ranks."""
    length = inputs[0].shape[2]
    scores = Scores(scale, extras.softcap, extras.alibi, extras.dropout_p, extras.seeds)
    index = dense.parts(layout, ring, length)

    def worker(link: Link) -> tuple[torch.Tensor, ...]:
        here = index[link.rank]
        q, k, v, dout, *dlse = (x[:, :, here] for x in inputs)
        ids = None if documents is None else documents[:, here]
        passes = Passes(link, layout, rule, scores, choose_backend(backend, q, v, scores))
        out, lse = passes.forward(q, k, v, ids, extras.sink)
        rows = BackwardQueries(q, out, lse, dout, dlse[0] if dlse else None)
        dq, dkv, dalibi = passes.backward(rows, k, v, ids)
        dsink = dense.NONE if extras.sink is None else sinks.gradient(rows, extras.sink)
        return out, lse, dq, *split(dkv, k, v), dsink, dense.NONE if dalibi is None else dalibi

    answers, counters = simulate.run(ring, worker)
    order = torch.cat(index).argsort()
    *by_token, dsink, dalibi = zip(*answers, strict=True)
    whole = (torch.cat(parts, 2)[:, :, order] for parts in by_token)
    return dense.Results(*whole, torch.stack(dsink).sum(0), torch.stack(dalibi).sum(0)), counters

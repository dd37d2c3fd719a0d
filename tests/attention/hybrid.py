"""A simulated grid of ring x ulysses over a whole sequence, and whose tokens are where."""

from __future__ import annotations

import torch
from attention import dense

from longctx.attention import simulate
from longctx.attention.backends.choose import choose_backend
from longctx.attention.band import Rule
from longctx.attention.comm import Counters, Link
from longctx.attention.hybrid.passes import HybridPasses, Saved
from longctx.attention.hybrid.ulysses import UlyssesGroup
from longctx.attention.passes import Passes
from longctx.attention.scores import Scores
from longctx.layout import get_layout


def parts(layout: str, ring: int, ulysses: int, length: int) -> list[torch.Tensor]:
    """Global indices of every rank, in the mesh's order."""
    dealt = get_layout(layout)
    return [dense.indices(dealt.member_spans(r, ring, u, ulysses, length)) for r in range(ring) for u in range(ulysses)]


def simulated(
    ring: int,
    ulysses: int,
    layout: str,
    rule: Rule,
    inputs: tuple[torch.Tensor, ...],
    documents: torch.Tensor | None = None,
    scale: float = 0.5,
    backend: str = "aten",
    extras: dense.Extras = dense.PLAIN,
    lean: bool = False,
) -> tuple[dense.Results, list[Counters]]:
    """Forward and backward of (q, k, v, dout[, dlse]) over simulated ranks."""
    length = inputs[0].shape[2]
    scores = Scores(scale, extras.softcap, extras.alibi, extras.dropout_p, extras.seeds)
    index = parts(layout, ring, ulysses, length)

    def worker(link: Link, group: UlyssesGroup) -> tuple[torch.Tensor, ...]:
        here = index[link.rank * ulysses + group.rank]
        q, k, v, dout, *dlse = (x[:, :, here] for x in inputs)
        ids = None if documents is None else documents[:, here]
        passes = Passes(link, layout, rule, scores, choose_backend(backend, q, v, scores))
        hybrid = HybridPasses(group, passes, q.shape[1], k.shape[1])
        out, lse, saved = hybrid.forward(q, k, v, ids, extras.sink)
        assert lse is not None
        last = dlse[0] if dlse else None
        if lean:
            saved, dout, last = hybrid.gather(Saved(q, k, v, ids, out, saved.lse), dout, last)
        else:
            dout, last = hybrid.gather_gradients(dout, last)
        dq, dk, dv, dsink, dalibi = hybrid.backward(saved, dout, last, extras.sink, extras.alibi)
        per = (dense.NONE if x is None else d for x, d in ((extras.sink, dsink), (extras.alibi, dalibi)))
        return out, lse, dq, dk, dv, *per

    answers, counters = simulate.run_grid(ring, ulysses, worker)
    order = torch.cat(index).argsort()
    *by_token, dsink, dalibi = zip(*answers, strict=True)
    whole = (torch.cat(parts, 2)[:, :, order] for parts in by_token)
    return dense.Results(*whole, torch.stack(dsink).sum(0), torch.stack(dalibi).sum(0)), counters

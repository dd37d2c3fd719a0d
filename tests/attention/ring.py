"""A simulated ring over a whole sequence: deal it out, run every rank's real passes, put the answers back in order."""

from __future__ import annotations

import torch
from attention import dense

from longctx.attention import simulate
from longctx.attention.backends.base import Rows
from longctx.attention.band import Rule
from longctx.attention.block import choose_backend
from longctx.attention.comm import Counters, Link
from longctx.attention.passes import Passes, split


def simulated(
    ring: int,
    layout: str,
    rule: Rule,
    inputs: tuple[torch.Tensor, ...],
    documents: torch.Tensor | None = None,
    scale: float = 0.5,
    backend: str = "aten",
) -> tuple[dense.Results, list[Counters]]:
    """Forward and backward of (q, k, v, dout[, dlse]) over `ring` simulated ranks."""
    length = inputs[0].shape[2]
    index = dense.parts(layout, ring, length)

    def worker(link: Link) -> tuple[torch.Tensor, ...]:
        here = index[link.rank]
        q, k, v, dout, *dlse = (x[:, :, here] for x in inputs)
        ids = None if documents is None else documents[:, here]
        passes = Passes(link, layout, rule, scale, choose_backend(backend, q.device))
        out, lse = passes.forward(q, k, v, ids)
        dq, dkv = passes.backward(Rows(q, out, lse, dout, dlse[0] if dlse else None), k, v, ids)
        return out, lse, dq, *split(dkv, k, v)

    answers, counters = simulate.run(ring, worker)
    order = torch.cat(index).argsort()
    return dense.Results(*(torch.cat(parts, 2)[:, :, order] for parts in zip(*answers, strict=True))), counters

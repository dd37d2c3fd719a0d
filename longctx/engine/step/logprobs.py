"""longctx.token_logprobs: log-probabilities of labels from sharded logits, for preference and distillation losses."""

from __future__ import annotations

import torch

from longctx.engine.step.rows import IGNORED
from longctx.layout import Layout
from longctx.mesh import Mesh
from longctx.sharding import unshard


def token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mesh: Mesh | None = None,
    *,
    layout: str | Layout = "zigzag",
    length: int | None = None,
) -> torch.Tensor:
    """Return each label's log-probability, 0 where the label is ignored. Differentiable.

    Args:
        logits: (B, T, V), this rank's shard; any floating dtype, computed in fp32.
        labels: (B, T) int64, shifted before sharding (``shift_labels`` of ``engine.shard``), −100 where ignored.
        mesh: gather the whole sequence, in global order, on every rank of the sequence group (collective over the
            group); None returns this rank's tokens. A loss of gathered values is the same on all ranks of the group:
            pass it to ``engine.backward(loss, replicated=True)``.
        length: the true global length S, to trim the padding.

    Returns:
        (B, T) fp32, or (B, S) with a mesh.
    """
    valid = labels != IGNORED
    picked = logits.gather(-1, labels.masked_fill(~valid, 0)[..., None])[..., 0].float()
    values = (picked - torch.logsumexp(logits.float(), -1)).masked_fill(~valid, 0.0)
    return values if mesh is None else unshard(values, mesh, length=length, layout=layout)

"""Cottention, attention by cosine similarity, token by token in plain PyTorch: the oracle of the tests.

With N(x) = x / ||x|| of each row and a learned exponent a = sigmoid(m) per head, in one of two ways ("scale_on"):

    value   o_t = sum_{j<=t} (N(q_t) . N(k_j)) n_j^-a v_j          n_t: the document's tokens up to and including t
    query   o_t = n_t^-a sum_{j<=t} (N(q_t) . N(k_j)) v_j

There is no softmax, so the state is one matrix per head, S_t = sum_{j<=t} N(k_j) (n_j^-a v_j)^T, and the count n_t.
"""

from __future__ import annotations

import torch

EPSILON = 1e-12
"""Smallest norm to divide by: a row of zeros stays zero."""


def unit(x: torch.Tensor) -> torch.Tensor:
    """Return the rows normalised to length 1; rows of zeros stay zero."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPSILON)


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    m: torch.Tensor,
    memory: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    *,
    scale_on: str = "value",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute causal cosine attention token by token.

    Args:
        q, k (B, H, T, D), v (B, H, T, Dv): fp32 or fp64. m: (H,).
        memory: (B, H, D, Dv), count: (B,) of the state to continue; None is empty.
        documents: (B, T) int64; the state is reset where the id changes; -1 is padding: not written, output 0.
        document: (B,) the document of the state.

    Returns:
        out (B, H, T, Dv), memory, count and document after the last token.
    """
    q, k, exponent = unit(q), unit(k), m.sigmoid()[:, None]
    if memory is None:
        memory = v.new_zeros((*k.shape[:2], k.shape[-1], v.shape[-1]))
    if count is None:
        count = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    outs = []
    for t in range(q.shape[2]):
        valid = torch.ones_like(count, dtype=torch.bool)
        if documents is not None:
            now = documents[:, t]
            valid = now >= 0
            same = now == document if document is not None else torch.zeros_like(valid)
            restart = valid & ~same
            count = torch.where(restart, 0, count)
            memory = torch.where(restart[:, None, None, None], 0.0, memory)
            document = torch.where(valid, now, -1 if document is None else document)
        count = count + valid
        size = count.clamp_min(1).to(v.dtype)[:, None, None] ** -exponent  # (B, H, 1)
        here = valid[:, None, None]
        value = torch.where(here, v[:, :, t], 0.0) * (size if scale_on == "value" else 1.0)
        memory = memory + torch.where(here, k[:, :, t], 0.0)[..., None] * value[:, :, None]
        out = (torch.where(here, q[:, :, t], 0.0)[:, :, None] @ memory)[:, :, 0]
        outs.append(out * (size if scale_on == "query" else 1.0))
    return torch.stack(outs, 2), memory, count, document

"""Attention of many queries that share few keys and values, in plain PyTorch: all logits at once, in fp32 (fp64 for
fp64).

    s = cap(((q . k + constant) * factor + shift) * scale) - slope * |i - j| + bias
    out = softmax(s) v      lse = log sum exp(s)

Rows are (beams, query heads per key head, new tokens), flattened: rows that read the same keys are adjacent, so that
one pass over the context serves all. EL: keys and values are the hidden states, with one key head. MLA: they are the
latent, whose rotary columns belong to the keys only. Grouped or multi-query heads: v is a tensor of its own.
"""

from __future__ import annotations

import torch

from .terms import Terms


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, value_width: int, heads: int, tokens: int, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out (B, G, rows, Dv), lse (B, G, rows)); (0, -inf) for a row that sees no key.

    Args:
        q: (B, G, beams * N * T, Dk), N = heads, T = tokens. k: (B, G, S, Dk). v: (B, G, S, Dv), or None: the first
            value_width columns of k.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    values = k[..., :value_width] if v is None else v
    s = q.to(dtype) @ k.to(dtype).mT
    if terms.constant is not None:
        s = s + terms.constant.to(dtype)[..., None]
    s = s.unflatten(2, (-1, heads, tokens))  # (B, G, beams, N, T, S)
    if terms.factor is not None:
        s = s * terms.factor.to(dtype)[:, :, None, :, None]
    if terms.shift is not None:
        s = s + terms.shift.to(dtype).unflatten(2, (-1, heads, tokens))[..., None]
    s = s * terms.scale
    if terms.softcap is not None:
        s = torch.tanh(s / terms.softcap) * terms.softcap
    query = terms.offset + torch.arange(tokens, device=q.device)[:, None]
    key = torch.arange(k.shape[2], device=q.device)
    if terms.slopes is not None:
        s = s - terms.slopes.to(dtype)[:, None, :, None, None] * (query - key).abs()
    if terms.bias is not None:
        s = s + terms.bias.to(dtype)
    if terms.mask is not None:
        s = s.masked_fill(~terms.mask, -torch.inf)
    if terms.lengths is not None:
        s = s.masked_fill(key >= terms.lengths.view(-1, 1, 1, 1, 1, 1), -torch.inf)
    if terms.causal:
        s = s.masked_fill(key > query, -torch.inf)
    s = s.flatten(2, 4)
    return torch.softmax(s, -1).nan_to_num(0.0) @ values.to(dtype), torch.logsumexp(s, -1)

"""Attention of many queries that share few keys and values, in plain PyTorch: all logits at once, in fp32 (fp64 for
fp64).

    s = cap(((q . k + constant) * factor + shift) * scale) - slope * |i - j| + bias
    out = softmax(s) v      lse = log sum exp(s)

Rows that read the same keys are adjacent, so one pass over the context serves them all. EL: the hidden states are both
keys and values, with one key head (docs/methods/el.md "Decode step"). MLA: the latent is both, and its rotary columns
belong to the keys only. Grouped or multi-query heads: v is a separate tensor.
"""

from __future__ import annotations

import torch

from .terms import Operands, Terms


def decode(operands: Operands, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out (B, G, rows, Dv), lse (B, G, rows)); (0, -inf) for a row that sees no key."""
    q, k, v, value_width, heads, tokens = operands
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

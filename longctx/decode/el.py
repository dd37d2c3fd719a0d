"""EL-attention (Yan et al. 2021): attend to the hidden states themselves, so keys and values are never made or cached.

    q_i . (W_k,i h + b_k,i) = (q_i W_k,i) . h + q_i . b_k,i          the query is expanded from D to C numbers
    sum_j p_ij (W_v,i h_j + b_v,i) = W_v,i (sum_j p_ij h_j) + b_v,i sum_j p_ij

The key bias adds one number to all logits of a query and drops out of the softmax, unless something else competes with
the keys (a sink) or bends the logits (a softcap): there it stays. The value bias is multiplied by the probabilities'
sum, which is 1 but for sinks, dropout and rows that see nothing. Both are exact here in every case.

A rotation of the keys by their positions (RoPE) stands between q and W_k and cannot be folded; a decoupled rotary part
(DeepSeek's MLA) can: its few columns are rotated, cached beside the hidden states and added to the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from longctx.decode.norm import Norm, key_scales
from longctx.decode.shared import TILE, Edit, SharedResult, shared_attention
from longctx.errors import AttentionError
from longctx.kernels.flash.dropout import kept

Bias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Partial(NamedTuple):
    """Attention over some of the keys: what ranks that share a context exchange, D + 1 numbers a query and head."""

    out: torch.Tensor
    """(B, H, T, Dv) fp32 or fp64, value bias included."""
    lse: torch.Tensor
    """(B, H, T)."""


def el_attention(
    x: torch.Tensor,
    hidden: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    w_o: torch.Tensor,
    *,
    heads: int,
    b_q: torch.Tensor | None = None,
    b_k: torch.Tensor | None = None,
    b_v: torch.Tensor | None = None,
    b_o: torch.Tensor | None = None,
    w_vo: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    q_offset: int | None = None,
    mask: torch.Tensor | None = None,
    bias: Bias | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    scales: torch.Tensor | None = None,
    rotary: object | None = None,
    tile: int = TILE,
) -> torch.Tensor:
    """Multi-head attention of x over hidden, equal to the model's own, without keys and values.

    Weights are laid out as torch.nn.Linear's: (out, in). G, the number of key heads, is w_k's rows / D.

    Args:
        x: (B * beams, T, d), what feeds W_q. hidden: (B, S, C), what feeds W_k and W_v: the encoder's output (once for
            all layers and beams), or the layer inputs of a causal decoder so far, x's own included.
        w_q: (H * D, d). w_k: (G * D, C). w_v: (G * Dv, C). w_o: (d, H * Dv).
        w_vo: (H, C, d) from `fold_values`, used instead of w_v and w_o: faster where d is not much above Dv.
        scale: default 1 / sqrt(D).
        causal: queries see keys up to their own position, q_offset + t; q_offset defaults to S - T.
        mask: broadcastable to (B * beams, H, T, S): bool, True where visible, or floating, added to the logits.
        bias: (positions of queries (T,), of keys (n,)) -> (H, T, n) or (T, n), added to the logits tile by tile:
            `RelativeBias`, `Alibi`, or any function.
        softcap, sink, dropout_p: as in `block_attention`; dropout_seed (B * beams,) int64.
        q_norm, k_norm: norms over each head; scales (B, S, G) from `key_scales` are k_norm's cached part.
        rotary: refused: see above.

    Returns:
        (B * beams, T, d) in x's dtype.

    Raises:
        AttentionError: arguments do not fit, or rotary keys are asked for.
    """
    if rotary is not None:
        raise AttentionError(
            "el_attention(rotary=…): RoPE turns each key by its position, which stands between the query and W_k, so "
            "keys cannot be folded into the query. Cache keys and values for this layer (attention kv), or give a "
            "decoupled rotary part to `expanded_attention` as MLA does"
        )
    if x.dim() != 3 or hidden.dim() != 3 or w_q.shape[0] % heads:
        raise AttentionError(
            f"x {tuple(x.shape)}, hidden {tuple(hidden.shape)}, w_q {tuple(w_q.shape)}, heads={heads}: expected x "
            "(B * beams, T, d), hidden (B, S, C) and heads that divide w_q's rows"
        )
    q = torch.nn.functional.linear(x, w_q, b_q).unflatten(-1, (heads, -1))
    q = q if q_norm is None else q_norm(q)
    partial = expanded_attention(
        q.transpose(1, 2), hidden, w_k, w_v if w_vo is None else None, b_k=b_k, b_v=None if w_vo is not None else b_v,
        scale=scale, causal=causal, q_offset=q_offset, mask=mask, bias=bias, softcap=softcap, sink=sink,
        dropout_p=dropout_p, dropout_seed=dropout_seed, k_norm=k_norm, scales=scales, tile=tile, full=w_vo is not None,
    )  # fmt: skip
    if w_vo is None:
        out = partial[0].transpose(1, 2).flatten(2).to(x.dtype)
        return torch.nn.functional.linear(out, w_o, b_o)
    context, mass = partial[0], partial[2]  # type: ignore[misc]
    out = torch.einsum("bhtc,hcd->btd", context.to(x.dtype), w_vo)
    if b_v is not None:
        per_head = torch.einsum("hv,dhv->hd", _per_query_head(b_v, heads, w_o), w_o.unflatten(1, (heads, -1)))
        out = out + torch.einsum("bht,hd->btd", mass.to(x.dtype), per_head)
    return out if b_o is None else out + b_o


def expanded_attention(
    q: torch.Tensor,
    hidden: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor | None,
    *,
    b_k: torch.Tensor | None = None,
    b_v: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    q_offset: int | None = None,
    mask: torch.Tensor | None = None,
    bias: Bias | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    k_norm: Norm | None = None,
    scales: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    full: bool = False,
    tile: int = TILE,
) -> Partial | SharedResult:
    """The part of `el_attention` between W_q and W_o; with a latent as `hidden` and `rotary`, DeepSeek's MLA.

    Args:
        q: (B * beams, H, T, D), after its norm, not scaled. hidden, w_k, w_v, masks and the rest: see `el_attention`.
        rotary: (q (B * beams, H, T, R), k (B, S, R)), both rotated: q_r . k_r joins the logit before the scale, whose
            default then is 1 / sqrt(D + R).
        full: leave W_v to the caller and return `SharedResult` with context (B * beams, H, T, C).
    """
    beams, key_heads = _counts(q, hidden, w_k)
    rows, heads, tokens, width = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rotary_width = 0 if rotary is None else rotary[0].shape[-1]
    factor = (width + rotary_width) ** -0.5 if scale is None else scale
    q = q * factor
    competing = sink is not None or softcap is not None
    shift = _dot(q, k_norm.bias, heads) if competing and k_norm is not None and k_norm.bias is not None else None
    weights, key_bias = w_k.unflatten(0, (key_heads, -1)), None if b_k is None else b_k.unflatten(0, (key_heads, -1))
    if k_norm is not None:
        q = q if k_norm.weight is None else q * _rows(k_norm.weight, heads)[:, None]
        weights = k_norm.centre(weights.mT).mT
        key_bias = None if key_bias is None else k_norm.centre(key_bias)
        if scales is None:
            scales = key_scales(hidden, w_k, b_k, key_heads, k_norm)
    constant = None if key_bias is None else _dot(q, key_bias, heads)
    if k_norm is None and not competing:
        constant = None  # the same for all keys of a query: the softmax does not see it
    expanded = torch.einsum("bgntd,gdc->bgntc", q.unflatten(1, (key_heads, -1)), weights).flatten(1, 2)
    shared, rotated = hidden, None
    if rotary is not None:
        rotated = rotary[0] * factor
        if k_norm is None:
            expanded, shared, rotated = torch.cat((expanded, rotated), -1), torch.cat((hidden, rotary[1]), -1), None
    q_positions = torch.arange(tokens, device=q.device) + (hidden.shape[1] - tokens if q_offset is None else q_offset)

    def edit(logits: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """(B, beams * H, T, n) -> the same, as (B * beams, H, T, n) in between."""
        logits = logits.view(rows, heads, tokens, -1)
        if constant is not None:
            logits = logits + constant.to(wide)[..., None]
        if k_norm is not None:
            assert scales is not None
            logits = logits * _per_head(scales[:, start:stop], beams, heads).to(wide)
        if shift is not None:
            logits = logits + shift.to(wide)[..., None]
        if rotated is not None:
            assert rotary is not None
            keys = rotary[1][:, start:stop].repeat_interleave(beams, 0).to(wide)
            logits = logits + rotated.to(wide) @ keys[:, None].mT
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        keys = torch.arange(start, stop, device=q.device)
        if bias is not None:
            logits = logits + bias(q_positions, keys).to(wide)
        if mask is not None:
            part = mask[..., start:stop]
            logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part.to(wide)
        if causal:
            logits = logits.masked_fill(keys[None, :] > q_positions[:, None], -torch.inf)
        return logits.view(rows // beams, beams * heads, tokens, -1)

    result = shared_attention(
        expanded.reshape(rows // beams, beams * heads, tokens, -1),
        shared,
        value_width=hidden.shape[2],
        edit=edit,
        keep=_dropout(rows, heads, tokens, beams, dropout_p, dropout_seed, q_positions),
        sink=None if sink is None else sink.repeat(beams),
        tile=tile,
    )
    context, lse, mass = (part.reshape(rows, heads, tokens, *part.shape[3:]) for part in result)
    if full:
        return SharedResult(context, lse, mass)
    assert w_v is not None
    values = w_v.unflatten(0, (key_heads, -1)).to(wide)
    out = torch.einsum("bgntc,gvc->bgntv", context.unflatten(1, (key_heads, -1)), values).flatten(1, 2)
    if b_v is not None:
        out = out + mass[..., None] * _rows(b_v.unflatten(0, (key_heads, -1)), heads)[:, None].to(wide)
    return Partial(out, lse)


def fold_values(w_v: torch.Tensor, w_o: torch.Tensor, heads: int) -> torch.Tensor:
    """W_v,i W_o,i of every head: (H, C, d), computed in fp32 or fp64 and returned in w_v's dtype.

    Args:
        w_v: (G * Dv, C). w_o: (d, H * Dv).
    """
    width = w_o.shape[1] // heads
    values, wide = w_v.unflatten(0, (-1, width)), torch.float64 if w_v.dtype == torch.float64 else torch.float32
    values = values.repeat_interleave(heads // values.shape[0], 0)
    return torch.einsum("hvc,dhv->hcd", values.to(wide), w_o.unflatten(1, (heads, -1)).to(wide)).to(w_v.dtype)


def _counts(q: torch.Tensor, hidden: torch.Tensor, w_k: torch.Tensor) -> tuple[int, int]:
    """(beams, key heads)."""
    shapes = f"q {tuple(q.shape)}, hidden {tuple(hidden.shape)}, w_k {tuple(w_k.shape)}"
    if q.dim() != 4 or hidden.dim() != 3 or w_k.dim() != 2 or w_k.shape[1] != hidden.shape[2]:
        raise AttentionError(f"{shapes}: expected q (B * beams, H, T, D), hidden (B, S, C), w_k (G * D, C)")
    if hidden.shape[0] == 0 or q.shape[0] % hidden.shape[0]:
        raise AttentionError(f"{shapes}: queries come in whole beams, so hidden's rows must divide q's")
    if w_k.shape[0] % q.shape[3] or q.shape[1] % (w_k.shape[0] // q.shape[3]):
        raise AttentionError(f"{shapes}: w_k must hold G heads of D = {q.shape[3]} rows, G dividing H = {q.shape[1]}")
    return q.shape[0] // hidden.shape[0], w_k.shape[0] // q.shape[3]


def _rows(per_head: torch.Tensor, heads: int) -> torch.Tensor:
    """(D,), (G, D) or (H, D) -> (1 or H, D)."""
    if per_head.dim() == 1:
        return per_head[None]
    return per_head.repeat_interleave(heads // per_head.shape[0], 0)


def _dot(q: torch.Tensor, per_head: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, H, T): every query with its head's vector."""
    return torch.einsum("bhtd,hd->bht", q, _rows(per_head, heads).expand(heads, -1))


def _per_head(scales: torch.Tensor, beams: int, heads: int) -> torch.Tensor:
    """(B, n, G) -> (B * beams, H, 1, n)."""
    per_head = scales.repeat_interleave(heads // scales.shape[2], 2)
    return per_head.repeat_interleave(beams, 0).transpose(1, 2)[:, :, None]


def _per_query_head(b_v: torch.Tensor, heads: int, w_o: torch.Tensor) -> torch.Tensor:
    """(G * Dv,) -> (H, Dv)."""
    return _rows(b_v.unflatten(0, (-1, w_o.shape[1] // heads)), heads)


def _dropout(
    rows: int, heads: int, tokens: int, beams: int, p: float, seeds: torch.Tensor | None, positions: torch.Tensor
) -> Edit | None:
    """Drop the probabilities that the hash of (seed, head, query, key) names; divide the rest by 1 - p."""
    if not p:
        return None
    if seeds is None or tuple(seeds.shape) != (rows,):
        raise AttentionError(f"dropout_p={p} needs dropout_seed, int64 of shape ({rows},): one seed a row of queries")

    def keep(met: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        keys = torch.arange(start, stop, device=met.device)
        stay = kept(seeds, heads, positions, keys, p).to(met.dtype) / (1 - p)
        return met * stay.view(rows // beams, beams * heads, tokens, -1)

    return keep

"""EL-attention (Yan et al. 2021): attend to the hidden states themselves; keys and values are never computed.

    q_i . (W_k,i h + b_k,i) = (q_i W_k,i) . h + q_i . b_k,i          the query grows from width D to width C
    sum_j p_ij (W_v,i h_j + b_v,i) = W_v,i (sum_j p_ij h_j) + b_v,i sum_j p_ij

The key bias adds one number to all logits of a query and drops out of the softmax, unless something else competes with
the keys (a sink) or bends the logits (a softcap): there it stays. The value bias is multiplied by the probabilities'
sum, which is 1 but for sinks, dropout and rows that see nothing. Both are exact here in every case.

A rotation of the keys by their positions (RoPE) stands between q and W_k and cannot be folded; a decoupled rotary part
(DeepSeek's MLA) can: its few columns are rotated, cached beside the hidden states and added to the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from longctx.decode import attend
from longctx.decode.logits import Bias, Logits, expand, rows_of
from longctx.decode.norm import Norm
from longctx.decode.sharded import merge_over_ranks
from longctx.decode.shared import TILE, Edit, SharedResult
from longctx.errors import AttentionError
from longctx.kernels.flash.dropout import kept
from longctx.mesh import Mesh


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
    key_positions: torch.Tensor | None = None,
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
    mesh: Mesh | None = None,
    tile: int = TILE,
    backend: str = "auto",
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
        key_positions: (S,) int64, where the keys stand in their context, in any order; default 0, 1, …, S - 1. Goes
            with q_offset. What goes by places (causal, bias, dropout) then works on any part of a context.
        mask: broadcastable to (B * beams, H, T, S): bool, True where visible, or floating, added to the logits.
        bias: (positions of queries (T,), of keys (n,)) -> (H, T, n) or (T, n), added to the logits tile by tile:
            `RelativeBias`, `Alibi`, or any function.
        softcap, sink, dropout_p: as in `block_attention`; dropout_seed (B * beams,) int64.
        q_norm, k_norm: norms over each head; scales (B, S, G) from `key_scales` are k_norm's cached part.
        rotary: refused: see above.
        mesh: whose ranks hold `hidden` in parts, of any lengths: each gives its own with its part of mask, scales and
            key_positions, x alike. W_v comes before the exchange, so that a query and head costs Dv + 1 numbers, not C.
        tile: keys at a time, in torch.
        backend: "auto", the decode kernels on a GPU, torch elsewhere and where there is dropout or a gradient; or one
            of "triton" and "torch".

    Returns:
        (B * beams, T, d) in x's dtype.

    Raises:
        AttentionError: arguments do not fit, or rotary keys are asked for.
    """
    ranks = 1 if mesh is None else mesh.sequence_size
    if ranks > 1 and key_positions is None and (causal or bias is not None or dropout_p):
        raise AttentionError(
            "el_attention(mesh=…) over parts of a context: causal, bias and dropout_p go by the places of the keys; "
            "give those of this rank's part as key_positions, and the first query's as q_offset"
        )
    if ranks > 1 and w_vo is not None:
        raise AttentionError(
            "el_attention(mesh=…, w_vo=…): folded values would be exchanged at full width; give w_v and w_o alone"
        )
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
    if mesh is not None and ranks > 1 and sink is not None and mesh.sequence_rank > 0:
        sink = torch.full_like(sink, torch.finfo(sink.dtype).min / 2)  # counts once; key biases on every rank
    partial = expanded_attention(
        q.transpose(1, 2), hidden, w_k, w_v if w_vo is None else None, b_k=b_k, b_v=b_v,
        scale=scale, causal=causal, q_offset=q_offset, key_positions=key_positions, mask=mask, bias=bias,
        softcap=softcap, sink=sink, dropout_p=dropout_p, dropout_seed=dropout_seed, k_norm=k_norm, scales=scales,
        tile=tile, backend=backend,
    )  # fmt: skip
    if mesh is not None and ranks > 1:
        partial = Partial(*merge_over_ranks(partial[:2], mesh))
    if w_vo is None:
        out = partial[0].transpose(1, 2).flatten(2).to(x.dtype)
        return torch.nn.functional.linear(out, w_o, b_o)
    context, mass = partial[0], partial[2]  # type: ignore[misc]
    out = torch.einsum("bhtc,hcd->btd", context.to(x.dtype), w_vo)
    if b_v is not None:
        per_head = torch.einsum(
            "hv,dhv->hd", rows_of(b_v.unflatten(0, (-1, w_o.shape[1] // heads)), heads), w_o.unflatten(1, (heads, -1))
        )
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
    key_positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: Bias | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    k_norm: Norm | None = None,
    scales: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    tile: int = TILE,
    backend: str = "auto",
) -> Partial | SharedResult:
    """The part of `el_attention` between W_q and W_o; with a latent as `hidden` and `rotary`, DeepSeek's MLA.

    Args:
        q: (B * beams, H, T, D), after its norm, not scaled. hidden, w_k, w_v, masks and the rest: see `el_attention`.
        rotary: (q (B * beams, H, T, R), k (B, S, R)), both rotated: q_r . k_r joins the logit before the scale, whose
            default then is 1 / sqrt(D + R).
        w_v: None leaves it to the caller, and `SharedResult` is returned, with context (B * beams, H, T, C).
    """
    beams, key_heads = _counts(q, hidden, w_k)
    rows, heads, tokens, width = q.shape
    factor = (width + (0 if rotary is None else rotary[0].shape[-1])) ** -0.5 if scale is None else scale
    made = expand(q * factor, hidden, w_k, b_k, k_norm, scales, competing=sink is not None or softcap is not None)
    queries, shared = made.queries, hidden
    turned = None if rotary is None else (rotary[0] * factor, rotary[1])
    if turned is not None and k_norm is None:
        queries, shared, turned = torch.cat((queries, turned[0]), -1), torch.cat((hidden, turned[1]), -1), None
    _check_places(key_positions, q_offset, hidden)
    offset = hidden.shape[1] - tokens if q_offset is None else q_offset
    positions = torch.arange(tokens, device=q.device) + offset
    edit = Logits(
        beams, heads, positions, made.constant, made.scales, made.shift, turned, softcap, bias, mask, causal,
        key_positions,
    )  # fmt: skip
    context, lse, mass = attend.shared(
        queries,
        shared,
        edit,
        offset,
        value_width=hidden.shape[2],
        keep=_dropout(rows, heads, beams, dropout_p, dropout_seed, edit),
        sink=sink,
        tile=tile,
        backend=backend,
    )
    if w_v is None:
        return SharedResult(context, lse, mass)
    values = w_v.unflatten(0, (key_heads, -1)).to(context.dtype)
    out = torch.einsum("bgntc,gvc->bgntv", context.unflatten(1, (key_heads, -1)), values).flatten(1, 2)
    if b_v is not None:
        out = out + mass[..., None] * rows_of(b_v.unflatten(0, (key_heads, -1)), heads)[:, None].to(out.dtype)
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


def _check_places(key_positions: torch.Tensor | None, q_offset: int | None, hidden: torch.Tensor) -> None:
    if key_positions is None:
        return
    if tuple(key_positions.shape) != (hidden.shape[1],) or key_positions.is_floating_point():
        raise AttentionError(
            f"key_positions {tuple(key_positions.shape)} of {key_positions.dtype}: expected one integer a row of "
            f"hidden, ({hidden.shape[1]},)"
        )
    if q_offset is None:
        raise AttentionError("key_positions without q_offset: say where the first query stands, or leave both out")


def _dropout(rows: int, heads: int, beams: int, p: float, seeds: torch.Tensor | None, logits: Logits) -> Edit | None:
    """Drop the probabilities that the hash of (seed, head, query, key) names; divide the rest by 1 - p."""
    if not p:
        return None
    if seeds is None or tuple(seeds.shape) != (rows,):
        raise AttentionError(f"dropout_p={p} needs dropout_seed, int64 of shape ({rows},): one seed a row of queries")

    def keep(met: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        stay = kept(seeds, heads, logits.positions, logits.keys(start, stop), p).to(met.dtype) / (1 - p)
        return met * stay.view(met.shape)

    return keep

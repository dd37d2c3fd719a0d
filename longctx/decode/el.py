"""EL-attention (Yan et al. 2021): attend to hidden states directly, without computing keys or values.

    q_i . (W_k,i h_j + b_k,i) = q'_i . h_j + q_i . b_k,i             q'_i = W_k,i^T q_i: expanded from width D to C
    sum_j p_ij (W_v,i h_j + b_v,i) = W_v,i c_i + b_v,i mu_i          c_i = sum_j p_ij h_j,   mu_i = sum_j p_ij

The key bias adds the same number to all logits of a query, so it cancels in the softmax except beside a sink or under a
softcap, where it is added. mu is the mass that multiplies the value bias: 1 except with sinks, with dropout and in rows
that see no key. Equations: docs/methods/el.md "Definition" and "Biases and other terms".

RoPE rotates keys between q and W_k, so W_k cannot be folded into q. A decoupled rotary part (DeepSeek's MLA) is
supported: its columns are rotated, cached beside the hidden states and added to the logits ("Rotary keys and MLA").
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
    """Attention over some of the keys, to be merged with the rest: D_v + 1 numbers per query and head."""

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
    """Compute multi-head attention of x over hidden without keys or values; the result is the model's own.

    Weights have torch.nn.Linear's layout (out, in). The number of key heads G is w_k's rows / D.

    Args:
        x: (B * beams, T, d), the input of W_q.
        hidden: (B, S, C), the input of W_k and W_v: the encoder's output (once for all layers and beams), or all layer
            inputs of a causal decoder so far, including x.
        w_q: (H * D, d). w_k: (G * D, C). w_v: (G * Dv, C). w_o: (d, H * Dv).
        w_vo: (H, C, d) from `fold_values`, used instead of w_v and w_o: faster if d is not much larger than Dv.
        scale: default 1 / sqrt(D).
        causal: queries see keys up to their own position, q_offset + t; q_offset defaults to S - T.
        key_positions: (S,) int64, the keys' positions in the whole context, in any order; default 0, 1, …, S - 1.
            Requires q_offset. With it causal, bias and dropout are correct on any part of a context.
        mask: broadcastable to (B * beams, H, T, S): bool, True where visible, or floating, added to the logits.
        bias: (query positions (T,), key positions (n,)) -> (H, T, n) or (T, n), added to the logits tile by tile:
            `RelativeBias`, `Alibi`, or any function.
        softcap, sink, dropout_p: as in `block_attention`; dropout_seed (B * beams,) int64.
        q_norm, k_norm: norms over each head. scales: (B, S, G) from `key_scales`, the part of k_norm to cache.
        rotary: not supported and raises; see the module's docstring.
        mesh: hidden is sharded over its sequence ranks, in parts of any length; each rank passes its part of hidden,
            mask, scales and key_positions, and the same x. W_v is applied before the exchange, which moves Dv + 1
            numbers per query and head instead of C.
        tile: keys per tile, in torch.
        backend: "auto" (the decode kernels on a GPU; torch elsewhere, and with dropout or a gradient), "triton" or
            "torch".

    Returns:
        (B * beams, T, d) in x's dtype.

    Raises:
        AttentionError: the arguments do not fit together, or rotary is given.
    """
    ranks = 1 if mesh is None else mesh.sequence_size
    if ranks > 1 and key_positions is None and (causal or bias is not None or dropout_p):
        raise AttentionError(
            "el_attention(mesh=…) over parts of a context: causal, bias and dropout_p depend on the keys' positions; "
            "give those of this rank's part as key_positions, and the first query's as q_offset"
        )
    if ranks > 1 and w_vo is not None:
        raise AttentionError(
            "el_attention(mesh=…, w_vo=…): folded values would be exchanged at full width; give only w_v and w_o"
        )
    if rotary is not None:
        raise AttentionError(
            "el_attention(rotary=…): RoPE rotates each key by its position, between the query and W_k, so W_k cannot "
            "be folded into the query. Cache keys and values for this layer (attention kv), or pass a decoupled rotary "
            "part to `expanded_attention` as MLA does"
        )
    if x.dim() != 3 or hidden.dim() != 3 or w_q.shape[0] % heads:
        raise AttentionError(
            f"x {tuple(x.shape)}, hidden {tuple(hidden.shape)}, w_q {tuple(w_q.shape)}, heads={heads}: expected x "
            "(B * beams, T, d), hidden (B, S, C) and heads dividing w_q's rows"
        )
    q = torch.nn.functional.linear(x, w_q, b_q).unflatten(-1, (heads, -1))
    q = q if q_norm is None else q_norm(q)
    if mesh is not None and ranks > 1 and sink is not None and mesh.sequence_rank > 0:
        # The sink counts on rank 0 only. Elsewhere it has weight 0, but is given, so that all ranks add q . b_k.
        sink = torch.full_like(sink, torch.finfo(sink.dtype).min / 2)
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
    # Folded values: o = sum_i W_vo,i^T c_i + sum_i mu_i W_o,i b_v,i + b_o.
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
    """Compute the part of `el_attention` between W_q and W_o; with a latent as `hidden` and `rotary`, DeepSeek's MLA.

    Args:
        q: (B * beams, H, T, D), after its norm, not scaled. All others: see `el_attention`.
        rotary: (q (B * beams, H, T, R), k (B, S, R)), both rotated: q_r . k_r is added to the logit before scaling, and
            the default scale is 1 / sqrt(D + R).
        w_v: None returns a `SharedResult` with context c (B * beams, H, T, C), to which the caller applies W_v.
    """
    beams, key_heads = _counts(q, hidden, w_k)
    rows, heads, tokens, width = q.shape
    scale = (width + (0 if rotary is None else rotary[0].shape[-1])) ** -0.5 if scale is None else scale
    # q' and what the folding leaves of the key bias and the norm. q is scaled first, so those are scaled too.
    expansion = expand(q * scale, hidden, w_k, b_k, k_norm, scales, competing=sink is not None or softcap is not None)
    queries, shared = expansion.queries, hidden
    rotated = None if rotary is None else (rotary[0] * scale, rotary[1])
    if rotated is not None and k_norm is None:
        # Without r_j on the product, rotary columns are further columns of q' and H: one product computes both.
        queries, shared, rotated = torch.cat((queries, rotated[0]), -1), torch.cat((hidden, rotated[1]), -1), None
    _check_positions(key_positions, q_offset, hidden)
    offset = hidden.shape[1] - tokens if q_offset is None else q_offset
    positions = torch.arange(tokens, device=q.device) + offset
    edit = Logits(
        beams, heads, positions, expansion.constant, expansion.scales, expansion.shift, rotated, softcap, bias, mask,
        causal, key_positions,
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
    # W_v,i c_i + b_v,i mu_i, with one W_v for the H / G query heads of a group.
    values = w_v.unflatten(0, (key_heads, -1)).to(context.dtype)
    out = torch.einsum("bgntc,gvc->bgntv", context.unflatten(1, (key_heads, -1)), values).flatten(1, 2)
    if b_v is not None:
        out = out + mass[..., None] * rows_of(b_v.unflatten(0, (key_heads, -1)), heads)[:, None].to(out.dtype)
    return Partial(out, lse)


def fold_values(w_v: torch.Tensor, w_o: torch.Tensor, heads: int) -> torch.Tensor:
    """Return (W_o,i W_v,i)^T of every head: (H, C, d), computed in fp32 or fp64 and returned in w_v's dtype.

    Args:
        w_v: (G * Dv, C). w_o: (d, H * Dv).
    """
    width = w_o.shape[1] // heads
    values, wide = w_v.unflatten(0, (-1, width)), torch.float64 if w_v.dtype == torch.float64 else torch.float32
    values = values.repeat_interleave(heads // values.shape[0], 0)
    return torch.einsum("hvc,dhv->hcd", values.to(wide), w_o.unflatten(1, (heads, -1)).to(wide)).to(w_v.dtype)


def _counts(q: torch.Tensor, hidden: torch.Tensor, w_k: torch.Tensor) -> tuple[int, int]:
    """Check the shapes; return (beams, key heads)."""
    shapes = f"q {tuple(q.shape)}, hidden {tuple(hidden.shape)}, w_k {tuple(w_k.shape)}"
    if q.dim() != 4 or hidden.dim() != 3 or w_k.dim() != 2 or w_k.shape[1] != hidden.shape[2]:
        raise AttentionError(f"{shapes}: expected q (B * beams, H, T, D), hidden (B, S, C), w_k (G * D, C)")
    if hidden.shape[0] == 0 or q.shape[0] % hidden.shape[0]:
        raise AttentionError(f"{shapes}: every row of hidden has equally many beams, so hidden's rows must divide q's")
    if w_k.shape[0] % q.shape[3] or q.shape[1] % (w_k.shape[0] // q.shape[3]):
        raise AttentionError(f"{shapes}: w_k must have G heads of D = {q.shape[3]} rows, G dividing H = {q.shape[1]}")
    return q.shape[0] // hidden.shape[0], w_k.shape[0] // q.shape[3]


def _check_positions(key_positions: torch.Tensor | None, q_offset: int | None, hidden: torch.Tensor) -> None:
    if key_positions is None:
        return
    if tuple(key_positions.shape) != (hidden.shape[1],) or key_positions.is_floating_point():
        raise AttentionError(
            f"key_positions {tuple(key_positions.shape)} of {key_positions.dtype}: expected one integer per row of "
            f"hidden, ({hidden.shape[1]},)"
        )
    if q_offset is None:
        raise AttentionError("key_positions without q_offset: give the first query's position, or omit both")


def _dropout(rows: int, heads: int, beams: int, p: float, seeds: torch.Tensor | None, logits: Logits) -> Edit | None:
    """Return the dropout of probabilities: a hash of (seed, head, i, j) decides; the kept ones are divided by 1 - p."""
    if not p:
        return None
    if seeds is None or tuple(seeds.shape) != (rows,):
        raise AttentionError(f"dropout_p={p} needs dropout_seed, int64 of shape ({rows},): one seed per row of q")

    def keep(probabilities: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        factor = kept(seeds, heads, logits.positions, logits.keys(start, stop), p).to(probabilities.dtype) / (1 - p)
        return probabilities * factor.view(probabilities.shape)

    return keep

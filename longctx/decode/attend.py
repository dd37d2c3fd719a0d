"""Attention of the newest tokens to a long context: the Triton kernels of kernels/decode on a GPU, torch elsewhere.

All of generation calls this: EL, MLA's latents, grouped and multi-query heads, sharded or not. The kernels have no
backward; "auto" uses torch if an input requires a gradient.
"""

from __future__ import annotations

import torch

from longctx.attention.backends.choose import triton_problem
from longctx.attention.merge import Partial
from longctx.decode.kernel import decode
from longctx.decode.logits import Logits
from longctx.decode.position import Alibi
from longctx.decode.shared import TILE, Edit, SharedResult, shared_attention
from longctx.errors import AttentionError
from longctx.kernels.decode import reference
from longctx.kernels.decode.terms import Operands, Terms

BACKENDS = ("auto", "torch", "triton")
Optional = torch.Tensor | None


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: Optional = None,
    *,
    value_width: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Optional = None,
    alibi: Optional = None,
    mask: Optional = None,
    lengths: Optional = None,
    causal: bool = False,
    q_offset: int | None = None,
    backend: str = "auto",
    splits: int | None = None,
) -> Partial:
    """Attend the queries of new tokens to cached keys and values; results over other keys can be merged with it.

    Args:
        q: (B * beams, H, T, D); the beams of a row of k are adjacent. k: (B, G, S, D), G dividing H, any S.
        v: (B, G, S, Dv), or None: the values are the first value_width columns of k (default: all).
        sink: (H,) an additional logit per head, without a value. alibi: (H,) slopes.
        mask: broadcastable to (B * beams, H, T, S): bool, True where visible, or floating, added to the logits.
        lengths: (B,) integer: keys from this index on are not read.
        causal: queries see keys up to their own position, q_offset + t; q_offset defaults to S - T.
        backend: "auto" (the kernels on a GPU if they support the call, else torch), "triton" or "torch".
        splits: number of splits of the context in the kernels; it changes the result only by rounding.

    Returns:
        out (B * beams, H, T, Dv) and lse (B * beams, H, T), fp32 or fp64; (0, -inf) where no key is visible.

    Raises:
        AttentionError: the shapes do not fit, or "triton" does not support the call.
    """
    _check(q, k, v, value_width)
    rows, heads, tokens, width = q.shape
    batch, groups, keys = k.shape[:3]
    fused = on_kernels(backend, q, k, v, mask, sink, alibi)
    offset = keys - tokens if q_offset is None else q_offset
    bias = None  # a floating mask is a bias
    if mask is not None:
        mask = fold(mask[..., :keys].expand(rows, heads, tokens, keys), batch, groups)
        mask, bias = (mask, None) if mask.dtype == torch.bool else (None, mask)
    terms = Terms(
        width**-0.5 if scale is None else scale, softcap, bias=bias, mask=mask, offset=offset,
        causal=causal and offset < keys - 1,  # a single new token sees all keys: no causal mask is needed
        slopes=None if alibi is None else alibi.view(groups, -1),
        lengths=None if lengths is None else lengths.to(torch.int32),
    )  # fmt: skip
    columns = v.shape[3] if v is not None else value_width or width
    operands = Operands(flat(q, batch, groups), k, v, columns, heads // groups, tokens)
    out, lse = decode(operands, terms, splits) if fused else reference.decode(operands, terms)
    out, lse = unfold(out, rows, heads, tokens), unfold(lse, rows, heads, tokens)
    return (out, lse) if sink is None else _add_sink(out, lse, sink)[:2]


def shared(
    q: torch.Tensor,
    hidden: torch.Tensor,
    logits: Logits,
    offset: int,
    *,
    value_width: int,
    keep: Edit | None = None,
    sink: Optional = None,
    tile: int = TILE,
    backend: str = "auto",
) -> SharedResult:
    """Compute `shared_attention` of expanded queries (B * beams, H, T, C) with all other terms of their logits.

    Args:
        hidden: (B, S, C). offset: position of the first query. keep, sink (H,), tile: see `shared_attention`.

    Returns:
        context (B * beams, H, T, Cv), lse and mass (B * beams, H, T), fp32 or fp64.
    """
    rows, heads, tokens, width = q.shape
    batch, unsupported = hidden.shape[0], ""
    if keep is not None:
        unsupported = "its decode kernels have no dropout"
    elif logits.rotary is not None:
        unsupported = "its decode kernels take rotary columns only where the keys have no norm"
    others = logits.constant, logits.scales, logits.shift, logits.mask, sink
    if not on_kernels(backend, q, hidden, *others, unsupported=unsupported):
        # In torch beams are further heads of a row of the batch: all of them read one copy of H.
        result = shared_attention(
            q.reshape(batch, -1, tokens, width), hidden, value_width=value_width, edit=logits, keep=keep,
            sink=None if sink is None else sink.repeat(rows // batch), tile=tile,
        )  # fmt: skip
        return SharedResult(*(part.reshape(rows, heads, tokens, *part.shape[3:]) for part in result))
    _check(q, hidden[:, None], None, value_width)
    # The kernels see one key head, whose keys and values are both H.
    terms = _terms(logits, batch, hidden.shape[1], tokens, offset)
    out, lse = decode(Operands(flat(q, batch, 1), hidden[:, None], None, value_width, heads, tokens), terms)
    out, lse = unfold(out, rows, heads, tokens), unfold(lse, rows, heads, tokens)
    if sink is not None:
        return SharedResult(*_add_sink(out, lse, sink))
    return SharedResult(out, lse, (lse != -torch.inf).to(lse.dtype))


def on_kernels(backend: str, q: torch.Tensor, k: torch.Tensor, *others: Optional, unsupported: str = "") -> bool:
    """Whether the kernels compute a call with these tensors; unsupported: why they cannot, if the caller knows.

    Raises:
        AttentionError: the backend is unknown, or it is "triton" and does not support the call.
    """
    if backend not in BACKENDS:
        raise AttentionError(f"backend={backend!r}: use one of {', '.join(map(repr, BACKENDS))}")
    if backend == "torch" or (backend == "auto" and q.device.type != "cuda"):
        return False
    problem = unsupported or _problem(q.dtype, q.device.type)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, *others)):
        problem = "its decode kernels have no gradient, and an input requires one (use torch.no_grad() to generate)"
    if backend == "triton" and problem:
        raise AttentionError(f"backend='triton': {problem}; use 'auto' or 'torch'")
    return not problem


@torch.compiler.assume_constant_result
def _problem(dtype: torch.dtype, device: str) -> str:
    """Return why the kernels do not support this dtype and device, or ""; they support any width, in chunks."""
    narrow = torch.empty(1, dtype=dtype, device="meta")
    return triton_problem(narrow, narrow, device)


def fold(x: torch.Tensor, batch: int, groups: int) -> torch.Tensor:
    """Return a view (B, G, beams, N, T, …) of (B * beams, H, T, …), N = H / G: adjacent rows read the same keys."""
    return x.unflatten(0, (batch, -1)).unflatten(2, (groups, -1)).movedim(2, 1)


def flat(x: torch.Tensor, batch: int, groups: int) -> torch.Tensor:
    """Return (B, G, rows, …) of (B * beams, H, T, …): the kernels' rows."""
    return fold(x, batch, groups).flatten(2, 4)


def unfold(x: torch.Tensor, rows: int, heads: int, tokens: int) -> torch.Tensor:
    """Return (B * beams, H, T, …) of (B, G, rows, …): the inverse of `flat`."""
    batch, groups = x.shape[:2]
    whole = x.unflatten(2, (rows // batch, heads // groups, tokens)).movedim(1, 2)
    return whole.reshape(rows, heads, tokens, *x.shape[3:])


def _terms(logits: Logits, batch: int, keys: int, tokens: int, offset: int) -> Terms:
    """Return EL's logits as the kernels' terms: tensors instead of functions of positions, with one key head."""
    heads, bias, mask = logits.heads, None, logits.mask
    # The kernels assume that key j has position j. Otherwise ALiBi becomes a bias, causality a mask.
    ordered, key_positions = logits.key_positions is None, logits.keys(0, keys)
    slopes = logits.bias.slopes[None] if isinstance(logits.bias, Alibi) and ordered else None
    if logits.bias is not None and slopes is None:
        bias = logits.bias(logits.positions, key_positions)
    if mask is not None:
        mask = mask[..., :keys]
        if mask.dtype != torch.bool:
            bias = mask if bias is None else bias + mask
            mask = None
    if logits.causal and not ordered:
        visible = key_positions <= logits.positions[:, None]
        mask = visible if mask is None else mask & visible
    pairs = logits.beams * batch, heads, tokens, keys
    factor = None  # r_j (B, S, G) per query head: (B, 1, H, S)
    if logits.scales is not None:
        factor = logits.scales.repeat_interleave(heads // logits.scales.shape[2], 2).transpose(1, 2)[:, None]
    causal = logits.causal and ordered and offset < keys - 1
    return Terms(
        1.0, logits.softcap, causal=causal, offset=offset, factor=factor, slopes=slopes,
        constant=None if logits.constant is None else flat(logits.constant, batch, 1),
        shift=None if logits.shift is None else flat(logits.shift, batch, 1),
        bias=None if bias is None else fold(bias.expand(pairs), batch, 1),
        mask=None if mask is None else fold(mask.expand(pairs), batch, 1),
    )  # fmt: skip


def _add_sink(
    out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (out, lse, mass) with the additional logits sink (H,) in the softmax."""
    with_sink = torch.logaddexp(lse, sink.to(lse.dtype)[None, :, None].expand_as(lse))
    mass = torch.exp(lse - with_sink)
    return out * mass[..., None], with_sink, mass


def _check(q: torch.Tensor, k: torch.Tensor, v: Optional, value_width: int | None) -> None:
    """Raise AttentionError if shapes, dtypes or devices do not fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {None if v is None else tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or q.shape[3] != k.shape[3] or not k.shape[0] or not k.shape[1]:
        raise AttentionError(f"{shapes}: expected q (B * beams, H, T, D) and k (B, G, S, D)")
    if q.shape[0] % k.shape[0] or q.shape[1] % k.shape[1]:
        raise AttentionError(f"{shapes}: B of k must divide q's rows and G must divide H")
    if v is not None and (v.dim() != 4 or v.shape[:3] != k.shape[:3]):
        raise AttentionError(f"{shapes}: expected v (B, G, S, Dv) beside k")
    if v is not None and value_width not in (None, v.shape[3]):
        raise AttentionError(f"value_width={value_width} and v {tuple(v.shape)}: omit one of them")
    if value_width is not None and v is None and not 0 < value_width <= k.shape[3]:
        raise AttentionError(f"value_width={value_width}: values are columns of k, 1 to {k.shape[3]}")
    for name, x in (("k", k), ("v", v)):
        if x is not None and (x.dtype != q.dtype or x.device != q.device):
            raise AttentionError(
                f"q {q.dtype} on {q.device}, {name} {x.dtype} on {x.device}: give one dtype and device"
            )

"""ring_attention: exact attention over a sequence that is sharded over a ring of ranks, for any layout and mask.

Queries stay; blocks of keys and values pass by (`schedule.py` says when, `comm.py` moves them) and each is merged into
the running result by a backend (`block.py`). The same loop serves every layout, mask and ring size; a ring of one sends
nothing. Forward and backward are operators of torch.library, so that torch.compile sees one node and a checkpoint
policy can save (out, lse) and so never repeat the hops.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.attention.arguments import check_documents, check_tensors, refuse_unbuilt, resolve_scale
from longctx.attention.backends.base import Rows
from longctx.attention.band import Rule, make_rule
from longctx.attention.block import choose_backend, fake_forward, register_gradient
from longctx.attention.comm import LocalLink, ProcessLink
from longctx.attention.passes import Passes, split
from longctx.errors import AttentionError
from longctx.layout import Layout, get_layout
from longctx.mesh import Mesh, from_key


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mesh: Mesh | None = None,
    causal: bool = True,
    layout: str | Layout = "zigzag",
    window: int | tuple[int | None, int | None] | None = None,
    document_ids: torch.Tensor | None = None,
    length: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention over the whole sequence, from and to this rank's part of it. Every rank of the ring calls it.

    Args:
        q: (B, H, T, Dk), k: (B, G, T, Dk), v: (B, G, T, Dv): this rank's tokens in the layout's local order (what
            `shard` returns), G dividing H, one floating dtype, T the same on every rank.
        mesh: the grid of ranks; None, or a ring of one, computes locally.
        causal: a token sees no later token, by global index.
        layout: how the sequence is dealt out; must be the one `shard` was given.
        window: tokens visible to the left including the token itself, or (strictly left, strictly right).
        document_ids: (B, T) integers, this rank's part; a token sees only tokens of its own document; negative ids are
            padding. Documents may cross ranks anywhere. Ids travel with the keys; all ranks give them, or none.
        length: the true global length where it is less than T times the ring: the rest is padding.
        scale: of the logits; default 1 / sqrt(Dk).
        softcap, sink, alibi, dropout_p: not supported yet; any value but the default raises.
        return_lse: also return the logarithm of the softmax's denominator.
        backend: "auto", "aten" (CPU) or "reference".

    Returns:
        out (B, H, T, Dv) in q's dtype [, lse (B, H, T) in fp32, fp64 for fp64]; both differentiable. A token that sees
        nothing, padding for one, gets out 0, lse -inf and no gradient.

    Raises:
        AttentionError: the arguments do not fit together, or are not supported.
    """
    refuse_unbuilt(softcap=softcap, sink=sink, alibi=alibi, dropout_p=dropout_p)
    check_tensors(q, k, v)
    check_documents("document_ids", document_ids, q)
    layout = get_layout(layout)
    ring = 1 if mesh is None else mesh.ring_size
    if mesh is not None and mesh.ulysses_size > 1:
        raise AttentionError(
            f"a mesh with ulysses={mesh.ulysses_size}: splitting heads is not supported in this version; use "
            f"Mesh(ring={mesh.sequence_size})"
        )
    if q.shape[2] != k.shape[2]:
        raise AttentionError(
            f"{q.shape[2]} queries and {k.shape[2]} keys on one rank: a sharded sequence has one length; "
            "block_attention takes two"
        )
    padded = q.shape[2] * ring
    if padded % layout.multiple(ring):
        raise AttentionError(
            f"{q.shape[2]} tokens a rank over a ring of {ring} make {padded}, and layout {layout.name!r} needs a "
            f"multiple of {layout.multiple(ring)}; pad with longctx.shard"
        )
    if length is not None and not 0 < length <= padded:
        raise AttentionError(
            f"length={length}: the ring holds {padded} tokens; give the true global length, 1 to {padded}"
        )
    rule = make_rule(causal, window)
    out, lse = torch.ops.longctx.ring_attention(
        q,
        k,
        v,
        document_ids,
        mesh.key if mesh is not None and ring > 1 else "",
        layout.name,
        rule.left,
        rule.right,
        None if length == padded else length,
        resolve_scale(scale, q),
        backend,
    )
    return (out, lse) if return_lse else out


# The operator: plain settings in its signature, the mesh as its registered key ("": a ring of one).

_SETTINGS = "Tensor? documents, str mesh, str layout, int? left, int? right, int? length, float scale, str backend"


@torch.library.custom_op(
    "longctx::ring_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)",
)
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None, *settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _passes(q, *settings).forward(q, k, v, documents)


@torch.library.custom_op(
    "longctx::ring_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SETTINGS}) "
    "-> (Tensor, Tensor)",
)
def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    documents: torch.Tensor | None,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _passes(q, *settings).backward(Rows(q, out, lse, dout, dlse), k, v, documents)


_forward.register_fake(fake_forward)


@_backward.register_fake
def _(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), k.new_empty(k.numel() + v.numel())


def _gradients(dout: torch.Tensor, dlse: torch.Tensor | None, *saved: Any) -> tuple[torch.Tensor, ...]:
    dq, dkv = _backward(dout, dlse, *saved)
    return dq, *split(dkv, saved[1], saved[2])


register_gradient(_forward, _gradients)


def _passes(
    q: torch.Tensor,
    mesh: str,
    layout: str,
    left: int | None,
    right: int | None,
    length: int | None,
    scale: float,
    backend: str,
) -> Passes:
    link = ProcessLink(from_key(mesh)) if mesh else LocalLink()
    return Passes(link, layout, Rule(left, right, length), scale, choose_backend(backend, q.device))

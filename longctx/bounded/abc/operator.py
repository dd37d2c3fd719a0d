"""abc_attention: attention over a memory of M slots (ABC), causal, bidirectional or cross, on one device or a ring."""

from __future__ import annotations

from dataclasses import replace

import torch

from longctx.attention.arguments import check_tensors, resolve_scale
from longctx.attention.comm import Link
from longctx.bounded.abc import fifo
from longctx.bounded.abc import forms as abc_forms
from longctx.bounded.abc.control import Cluster, Control, Fifo
from longctx.bounded.arguments import check_backend, check_ids, check_logits, check_state, choose_backend
from longctx.bounded.ranks.packed import memory_each
from longctx.bounded.ranks.sequence import Place, locate
from longctx.bounded.state import ABCState, FifoState
from longctx.errors import AttentionError
from longctx.layout import Layout
from longctx.mesh import Mesh

Logits = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
NORMALIZERS = ("prefix", "running", "global", "sum")


def abc_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    control: Logits | Control,
    *,
    causal: bool = True,
    normalizer: str = "prefix",
    scale: float | None = None,
    mesh: Mesh | None = None,
    layout: str | Layout = "zigzag",
    document_ids: torch.Tensor | None = None,
    length: int | None = None,
    state: ABCState | FifoState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, ABCState | FifoState]:
    """Attention with bounded-memory control (Peng et al., ACL 2022): keys and values are written into M slots, and
    queries read the slots by softmax. Time is linear in the length, the state does not grow.

        K_t = sum_j phi_tj (x) k_j      V_t = sum_j phi_tj (x) v_j      out_t = V_t^T softmax(scale K_t q_t)

    Args:
        q: (B, H, T, D), this rank's tokens. k: (B, G, T, D), v: (B, G, T, Dv), G dividing H; one floating dtype.
            Without `causal` (and a ring) k and v may have another length than q.
        control: logits (B, G, T, M); a pair of them, for keys and for values; or a strategy of
            longctx.bounded.abc.control. Logits of -inf write nothing.
        causal: a token reads what was written up to and with itself; else all reads are of all tokens.
        normalizer: how logits s become weights phi. "prefix": e^{s_j} over the sum of e^{s_i} of all i <= t, a mean;
            "running": e^{s_j} over the sum of i <= j, a token keeps its weight; "global": over all tokens, which is
            what "prefix" means when not causal; "sum": for strategies that choose slots or give weights, added up.
        scale: of the reading softmax, any finite number; default 1 / sqrt(D).
        mesh: whose ring holds the sequence; None is one device. layout: "zigzag" or "contiguous".
        document_ids: (B, T) int64, on all ranks. A document is one run of an id, and an id that comes back after
            another is a new one; the memory restarts with each. -1 is padding, as if it were not there: it ends no run
            and takes no place in a queue. In cross attention those of the keys.
        length: the true global length; tokens beyond are padding.
        state: of the tokens before; fp32 (fp64 for fp64 inputs); gradients flow into it. On a ring the same one on
            every rank, and its gradient is each rank's share, as a parameter's: their sum is the whole.
        return_state: also return the state after the sequence's last token, on a ring the same one on every rank.
        backend: "chunked", torch's products over chunks, in fp32 (fp64 for fp64); "triton", kernels for causal "prefix"
            with one control, not fp64, slots and head dimensions up to 128; "auto", the kernels on a GPU if they can.

    Returns:
        out (B, H, T, Dv) in q's dtype [, state]. A token that reads nothing, padding for one, gets 0 and no gradient.

    Raises:
        AttentionError: the arguments do not fit together, or are not supported.
    """
    return attend(
        q, k, v, control, causal, normalizer, scale, mesh, layout, document_ids, length, state, return_state, backend
    )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    control: Logits | Control,
    causal: bool,
    normalizer: str,
    scale: float | None,
    mesh: Mesh | None,
    layout: str | Layout,
    document_ids: torch.Tensor | None,
    length: int | None,
    state: ABCState | FifoState | None,
    return_state: bool,
    backend: str,
    link: Link | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ABCState | FifoState]:
    """`abc_attention` over a link of the caller's choice."""
    check_tensors(q, k, v)
    check_backend(backend)
    check_ids(document_ids, q, k, causal)
    if isinstance(control, Fifo):
        choose_backend(backend, q, v, "a queue of tokens is no memory that is summed up")
        found = fifo.attend(
            q, k, v, control, causal, scale, mesh, layout, document_ids, length, state, return_state, link
        )
        return found if return_state else found[0]  # type: ignore[return-value]  # a state that was asked for is one
    place = locate(
        k.shape[2], k.shape[0], k.device,
        mesh=mesh, layout=layout, document_ids=document_ids, length=length, link=link,
    )  # fmt: skip
    check_state(state, place, ABCState, q.shape[0])
    assert state is None or isinstance(state, ABCState)
    inputs, carried = _inputs(q, k, v, control, causal, normalizer, scale, place, state, return_state)
    inputs = replace(inputs, backend=choose_backend(backend, q, v, _without_kernel(inputs, causal)))
    if not causal and memory_each(place, q.shape[2], state is not None or return_state):
        return abc_forms.packed(inputs, place)
    if causal:
        out, after = abc_forms.causal(inputs, place, state, return_state)
    else:
        out, after = abc_forms.over_all(inputs, place, state)
    if not return_state:
        return out
    fields = vars(after) | carried
    return out, ABCState(**fields)


def _inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    control: Logits | Control,
    causal: bool,
    normalizer: str,
    scale: float | None,
    place: Place,
    state: ABCState | None,
    return_state: bool,
) -> tuple[abc_forms.Inputs, dict[str, torch.Tensor]]:
    """(the inputs of the forms, what the control adds to the state)."""
    kind, carried = "logits", {}
    if state is not None and (
        (state.count is not None) != getattr(control, "positional", False)
        or (state.clusters is not None) != isinstance(control, Cluster)
    ):
        raise AttentionError("this state was made by another control: it counted its tokens, or clusters, or did not")
    if isinstance(control, Control):
        kind = control.kind
        before = (None, None) if state is None else (state.count, state.document)
        counted, last = place.counts(*before, total=return_state)
        if control.positional:
            carried["count"] = last.expand(k.shape[0]).clone()
        value = None
        if isinstance(control, Cluster) and causal:
            key, carried["clusters"] = control.online(k, counted - 1, place, state, return_state)
        elif isinstance(control, Cluster) and (state is not None or place.link.ring > 1):
            raise AttentionError(
                "control cluster without causal, on a ring or after a state: k-means looks at all keys of a document "
                "again in every round, which no state holds; use it on one device and whole sequences, or with causal"
            )
        else:
            key = control.control(k, counted - 1, place.valid, causal)
        if kind == "slots" and normalizer == "sum":
            key = key.exp()
    elif isinstance(control, torch.Tensor):
        key, value = control, None
    else:
        key, value = control
    for name, s in (("control", key), ("control of values", value)):
        check_logits(name, s, k)
    rule = _normalizer(normalizer, kind, causal)
    return abc_forms.Inputs(q, k, v, key, value, rule, resolve_scale(scale, q)), carried


def _normalizer(normalizer: str, kind: str, causal: bool) -> str:
    if normalizer not in NORMALIZERS:
        raise AttentionError(f"normalizer={normalizer!r}: use one of {', '.join(map(repr, NORMALIZERS))}")
    if kind == "weights":
        if normalizer not in ("prefix", "sum"):
            raise AttentionError(f"normalizer={normalizer!r}: this control gives weights, which are summed: use 'sum'")
        return "sum"
    if normalizer == "sum" and kind == "logits":
        raise AttentionError("normalizer='sum' of logits: e^s has no bound; use 'prefix' or 'running'")
    if causal and normalizer == "global":
        raise AttentionError("normalizer='global' is a mean over all tokens, later ones too: it needs causal=False")
    if not causal and normalizer == "running":
        raise AttentionError("normalizer='running' follows the order of tokens: it needs causal=True; use 'global'")
    return "prefix" if normalizer == "global" else normalizer


_WITHOUT_CAUSAL = "without causal there is one memory, a few matrix products, and no kernel for it"


def _without_kernel(x: abc_forms.Inputs, causal: bool) -> str:
    """What of a call the Triton kernels do not do; empty if they do it."""
    if not causal:
        return _WITHOUT_CAUSAL
    if x.normalizer != "prefix":
        return f"its kernels have no normalizer {x.normalizer!r}, which this control or call asks for, only 'prefix'"
    if x.value is not None:
        return "its kernels have one control for keys and values, not a pair"
    widest = max(x.q.shape[3], x.v.shape[3], x.key.shape[3])
    return "" if widest <= 128 else f"its kernels take head dimensions and slots up to 128, not {widest}"

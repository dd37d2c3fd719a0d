"""abc_attention: attention over M state slots (ABC), causal, bidirectional or cross, on one device or a ring."""

from __future__ import annotations

from dataclasses import replace

import torch

from longctx.attention.arguments import check_tensors, resolve_scale
from longctx.bounded.abc import fifo
from longctx.bounded.abc import forms as abc_forms
from longctx.bounded.abc.control import Cluster, Control, Fifo
from longctx.bounded.abc.weights import Normalizer
from longctx.bounded.arguments import SequenceCall, check_backend, check_ids, check_logits, check_state, choose_backend
from longctx.bounded.ranks.packed import attend_documents, separate_documents
from longctx.bounded.ranks.sequence import LocalTokens
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
    queries read the slots by softmax. Time is linear in the length; the state does not grow.

        K_t = sum_j phi_tj (x) k_j      V_t = sum_j phi_tj (x) v_j      out_t = V_t^T softmax(scale K_t q_t)

    Args:
        q: (B, H, T, D), this rank's tokens. k: (B, G, T, D), v: (B, G, T, Dv), G dividing H; one floating dtype.
            Without `causal` (and a ring) k and v may have another length than q.
        control: logits (B, G, T, M); a pair of them, for keys and for values; or a strategy of
            longctx.bounded.abc.control. Logits of -inf write nothing.
        causal: a token reads what was written up to and including itself; else every query reads all tokens.
        normalizer: how logits s become weights phi. "prefix": e^{s_j} over the sum of e^{s_i} for all i <= t, a mean;
            "running": e^{s_j} over the sum for i <= j, so a token keeps its weight; "global": over all tokens, which is
            what "prefix" means when not causal; "sum": for strategies that choose slots or give weights, added up.
        scale: of the reading softmax, any finite number; default 1 / sqrt(D).
        mesh: whose ring holds the sequence; None is one device. layout: "zigzag" or "contiguous".
        document_ids: (B, T) int64, on all ranks. A document is one run of an id; an id that returns after another id is
            a new document (`ring_attention` differs: there equal ids are one). The state restarts with each. -1 is
            padding and is ignored: it ends no run and takes no slot of a queue. In cross attention they are the keys'
            ids.
        length: the true global length; tokens beyond it are padding.
        state: of the tokens before; fp32 (fp64 for fp64 inputs); gradients flow into it. On a ring every rank passes
            the same state and gets its share of the gradient, as for a parameter: the sum is the whole.
        return_state: also return the state after the sequence's last token, on a ring the same on every rank.
        backend: "chunked", torch products over chunks, in fp32 (fp64 for fp64); "triton", kernels for causal "prefix"
            with one control, not fp64, slots and head dimensions up to 128; "auto", the kernels on a GPU if they
            can.

    Returns:
        out (B, H, T, Dv) in q's dtype [, state]. A token that reads nothing, such as padding, gets 0 and no gradient.

    Raises:
        AttentionError: the arguments do not fit together, or are not supported.
    """
    call = SequenceCall(
        causal=causal, mesh=mesh, layout=layout, document_ids=document_ids, length=length, state=state,
        return_state=return_state, backend=backend,
    )  # fmt: skip
    return attend(q, k, v, control, call, normalizer=normalizer, scale=scale)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    control: Logits | Control,
    call: SequenceCall,
    *,
    normalizer: str = "prefix",
    scale: float | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ABCState | FifoState]:
    """`abc_attention` with the arguments that both operators share in one value, and over any link."""
    check_tensors(q, k, v)
    check_backend(call.backend)
    check_ids(call.document_ids, q, k, call.causal)
    if isinstance(control, Fifo):
        choose_backend(call.backend, q, v, "the kernels do not compute queues of tokens")
        found = fifo.attend(q, k, v, control, call, resolve_scale(scale, q))
        return found if call.return_state else found[0]  # type: ignore[return-value]  # then there is a state
    local = call.locate(k)
    check_state(call.state, local, ABCState, q.shape[0])
    assert call.state is None or isinstance(call.state, ABCState)
    s_k, s_v, kind, carried = _controls(k, control, normalizer, local, call)
    chosen = _normalizer(normalizer, kind, call.causal)
    inputs = abc_forms.ABCInputs(q, k, v, s_k, s_v, chosen, resolve_scale(scale, q))
    inputs = replace(inputs, backend=choose_backend(call.backend, q, v, _unsupported(inputs, call.causal)))
    if not call.causal and separate_documents(local, q.shape[2], call.with_state):
        return attend_documents(inputs, local)
    if call.causal:
        out, after = abc_forms.causal(inputs, local, call.state, call.return_state)
    else:
        out, after = abc_forms.over_all(inputs, local, call.state)
    return (out, ABCState(**(vars(after) | carried))) if call.return_state else out


def _controls(
    k: torch.Tensor, control: Logits | Control, normalizer: str, local: LocalTokens, call: SequenceCall
) -> tuple[torch.Tensor, torch.Tensor | None, str, dict[str, torch.Tensor]]:
    """Return the controls of keys and of values (or None), their kind, and what a strategy adds to the state."""
    state, carried = call.state, {}
    assert state is None or isinstance(state, ABCState)
    if state is not None and (
        (state.count is not None) != getattr(control, "positional", False)
        or (state.clusters is not None) != isinstance(control, Cluster)
    ):
        raise AttentionError("this state was made by another control: only one of the two counts tokens or clusters")
    kind, s_v = "logits", None
    if isinstance(control, Control):
        kind = control.kind
        before = (None, None) if state is None else (state.count, state.document)
        counted, last = local.counts(*before, total=call.return_state)
        if control.positional:
            carried["count"] = last.expand(k.shape[0]).clone()
        if isinstance(control, Cluster) and call.causal:
            s_k, carried["clusters"] = control.online(k, counted - 1, local, state, call.return_state)
        elif isinstance(control, Cluster) and (state is not None or local.link.ring > 1):
            raise AttentionError(
                "control cluster without causal, on a ring or after a state: every iteration of k-means needs all keys "
                "of a document, which no state holds; use it on one device and whole sequences, or with causal"
            )
        else:
            s_k = control.control(k, counted - 1, local.valid, call.causal)
        if kind == "slots" and normalizer == "sum":
            s_k = s_k.exp()
    elif isinstance(control, torch.Tensor):
        s_k = control
    else:
        s_k, s_v = control
    for name, s in (("control", s_k), ("control of values", s_v)):
        check_logits(name, s, k)
    return s_k, s_v, kind, carried


def _normalizer(normalizer: str, kind: str, causal: bool) -> Normalizer:
    if normalizer not in NORMALIZERS:
        raise AttentionError(f"normalizer={normalizer!r}: use one of {', '.join(map(repr, NORMALIZERS))}")
    if kind == "weights":
        if normalizer not in ("prefix", "sum"):
            raise AttentionError(f"normalizer={normalizer!r}: this control gives weights, which are summed: use 'sum'")
        return Normalizer.SUM
    if normalizer == "sum" and kind == "logits":
        raise AttentionError("normalizer='sum' of logits: e^s has no bound; use 'prefix' or 'running'")
    if causal and normalizer == "global":
        raise AttentionError("normalizer='global' is a mean over all tokens, later ones too: it needs causal=False")
    if not causal and normalizer == "running":
        raise AttentionError("normalizer='running' follows the order of tokens: it needs causal=True; use 'global'")
    return Normalizer("prefix" if normalizer == "global" else normalizer)


def _unsupported(x: abc_forms.ABCInputs, causal: bool) -> str:
    """Say what of a call the Triton kernels do not support; empty if they support it."""
    if not causal:
        return "the kernels are for causal attention; without causal it is a few matrix products"
    if x.normalizer != Normalizer.PREFIX:
        return f"its kernels support normalizer 'prefix', not {x.normalizer.value!r} of this control or call"
    if x.s_v is not None:
        return "its kernels support one control for keys and values, not a pair"
    widest = max(x.q.shape[3], x.v.shape[3], x.s_k.shape[3])
    return "" if widest <= 128 else f"its kernels support head dimensions and slots up to 128, not {widest}"

"""Checks of what users hand to attention with bounded memory; they look at shapes and dtypes, not at data."""

from __future__ import annotations

import torch

from longctx.attention.arguments import check_documents
from longctx.attention.backends.choose import triton_problem
from longctx.bounded.ranks.sequence import Place
from longctx.bounded.state import State
from longctx.errors import AttentionError

BACKENDS = ("auto", "chunked", "triton")


def check_backend(backend: str) -> None:
    """A backend that exists."""
    if backend not in BACKENDS:
        raise AttentionError(f"backend={backend!r}: use one of {', '.join(map(repr, BACKENDS))}")


def choose_backend(backend: str, q: torch.Tensor, v: torch.Tensor, unsupported: str = "") -> str:
    """ "chunked" or "triton": what was asked for, or the kernels for "auto" on a GPU where they can.

    Args:
        unsupported: what this call asks for and the kernels do not do; empty if there is nothing.
    """
    check_backend(backend)
    if backend == "chunked" or (backend == "auto" and q.device.type != "cuda"):
        return "chunked"
    problem = unsupported or triton_problem(q, v, q.device.type)
    if backend == "triton" and problem:
        raise AttentionError(f"backend='triton': {problem}; use 'auto' or 'chunked'")
    return "chunked" if problem else "triton"


def check_ids(ids: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, causal: bool) -> None:
    """Document ids of the keys; as many queries as keys if causal."""
    if causal and q.shape[2] != k.shape[2]:
        raise AttentionError(
            f"{q.shape[2]} queries and {k.shape[2]} keys: causal attention needs one key a query; to go on after "
            "earlier tokens pass their `state`, for cross attention causal=False"
        )
    check_documents("document_ids", ids, k)


def check_logits(name: str, s: torch.Tensor | None, k: torch.Tensor) -> None:
    """(B, G, T, M) floating, beside k (B, G, T, D)."""
    if s is None:
        return
    if s.dim() != 4 or s.shape[:3] != k.shape[:3] or s.shape[3] < 1 or not s.is_floating_point():
        raise AttentionError(
            f"{name} {tuple(s.shape)} of {s.dtype}: expected floating-point logits (B, G, T, M) beside keys "
            f"{tuple(k.shape)}, one a token and slot"
        )
    if s.device != k.device:
        raise AttentionError(f"{name} on {s.device}, but the keys are on {k.device}")


def check_state(state: State | None, place: Place, kind: type[State], batch: int) -> None:
    """A state of this operator and of as many rows, which knows its document if documents are told apart."""
    if state is None:
        return
    if not isinstance(state, kind):
        raise AttentionError(f"state is a {type(state).__name__}: expected {kind.__name__}, as return_state=True gives")
    if state.rows != batch:
        raise AttentionError(f"state of {state.rows} rows, and the batch has {batch}: use state.select to choose rows")
    if place.ids is not None and getattr(state, "document", None) is None:
        raise AttentionError(
            "document_ids with a state that was made without them: pass document_ids from the first call on"
        )

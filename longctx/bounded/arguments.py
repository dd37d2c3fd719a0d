"""The arguments that both operators share, and checks of shapes and dtypes (not of data)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longctx.attention.arguments import check_documents
from longctx.attention.backends.choose import triton_problem
from longctx.attention.comm import Link
from longctx.bounded.ranks.sequence import LocalTokens, locate
from longctx.bounded.state import State
from longctx.errors import AttentionError
from longctx.layout import Layout
from longctx.mesh import Mesh

BACKENDS = ("auto", "chunked", "triton")


@dataclass(frozen=True, kw_only=True)
class SequenceCall:
    """The arguments that `abc_attention` and `cosine_attention` share; see there.

    link: this rank's end of the ring, instead of the one that `mesh` gives.
    """

    causal: bool = True
    mesh: Mesh | None = None
    layout: str | Layout = "zigzag"
    document_ids: torch.Tensor | None = None
    length: int | None = None
    state: State | None = None
    return_state: bool = False
    backend: str = "auto"
    link: Link | None = None

    def locate(self, k: torch.Tensor) -> LocalTokens:
        """Locate the tokens of keys (B, G, T, D)."""
        return locate(
            k.shape[2], k.shape[0], k.device, mesh=self.mesh, layout=self.layout, document_ids=self.document_ids,
            length=self.length, link=self.link,
        )  # fmt: skip

    @property
    def with_state(self) -> bool:
        """Whether a state is given or returned."""
        return self.state is not None or self.return_state


def check_backend(backend: str) -> None:
    """Raise AttentionError if there is no such backend."""
    if backend not in BACKENDS:
        raise AttentionError(f"backend={backend!r}: use one of {', '.join(map(repr, BACKENDS))}")


def choose_backend(backend: str, q: torch.Tensor, v: torch.Tensor, unsupported: str = "") -> str:
    """Return "chunked" or "triton"; "auto" is the kernels on a GPU if they support the call.

    Args:
        unsupported: what of this call the kernels do not support; empty if they support all of it.
    """
    check_backend(backend)
    if backend == "chunked" or (backend == "auto" and q.device.type != "cuda"):
        return "chunked"
    problem = unsupported or triton_problem(q, v, q.device.type)
    if backend == "triton" and problem:
        raise AttentionError(f"backend='triton': {problem}; use 'auto' or 'chunked'")
    return "chunked" if problem else "triton"


def check_ids(ids: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, causal: bool) -> None:
    """Check the keys' document ids, and that causal attention has as many queries as keys."""
    if causal and q.shape[2] != k.shape[2]:
        raise AttentionError(
            f"{q.shape[2]} queries and {k.shape[2]} keys: causal attention needs one key per query; to continue after "
            "earlier tokens pass their `state`, for cross attention causal=False"
        )
    check_documents("document_ids", ids, k)


def check_logits(name: str, s: torch.Tensor | None, k: torch.Tensor) -> None:
    """Check logits (B, G, T, M) against keys (B, G, T, D)."""
    if s is None:
        return
    if s.dim() != 4 or s.shape[:3] != k.shape[:3] or s.shape[3] < 1 or not s.is_floating_point():
        raise AttentionError(
            f"{name} {tuple(s.shape)} of {s.dtype}: expected floating-point logits (B, G, T, M), one per token and "
            f"slot, for keys {tuple(k.shape)}"
        )
    if s.device != k.device:
        raise AttentionError(f"{name} on {s.device}, but the keys are on {k.device}")


def check_state(state: State | None, local: LocalTokens, kind: type[State], batch: int) -> None:
    """Check that a state is this operator's, has as many rows as the batch, and knows its document if there are ids."""
    if state is None:
        return
    if not isinstance(state, kind):
        raise AttentionError(f"state is a {type(state).__name__}: expected {kind.__name__}, as return_state=True gives")
    if state.rows != batch:
        raise AttentionError(f"state of {state.rows} rows, and the batch has {batch}: use state.select to choose rows")
    if local.ids is not None and getattr(state, "document", None) is None:
        raise AttentionError(
            "document_ids with a state that was made without them: pass document_ids from the first call on"
        )

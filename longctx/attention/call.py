"""A call's settings as an operator of torch.library carries them: plain values, the mesh as its registered key."""

from __future__ import annotations

import torch

from longctx.attention.backends.choose import choose_backend, pattern_of
from longctx.attention.band import Rule
from longctx.attention.comm import LocalLink, ProcessLink
from longctx.attention.operator import make_scores
from longctx.attention.passes import Passes
from longctx.mesh import from_key

SETTINGS = (
    "Tensor? documents, Tensor? seeds, str mesh, str layout, int? left, int? right, int? length, float scale, "
    "float? softcap, float dropout_p, str backend"
)
"""As a schema writes them; the mesh "" is a ring of one."""


def make_passes(
    q: torch.Tensor,
    v: torch.Tensor,
    alibi: torch.Tensor | None,
    documents: torch.Tensor | None,
    seeds: torch.Tensor | None,
    mesh: str,
    layout: str,
    left: int | None,
    right: int | None,
    length: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    backend: str,
) -> Passes:
    """The ring's two passes under these settings."""
    grid = from_key(mesh) if mesh else None
    link = LocalLink() if grid is None or grid.ring_size == 1 else ProcessLink(grid)
    scores = make_scores(q, scale, softcap, alibi, dropout_p, seeds)
    rule = Rule(left, right, length)
    chosen = choose_backend(backend, q, v, scores, pattern_of(rule, documents))
    return Passes(link, layout, rule, scores, chosen)

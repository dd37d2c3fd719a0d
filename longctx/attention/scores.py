"""Scores: what a logit is made of besides q.k, and how a probability is dropped. Data, for any backend to read.

    s_ij = cap(scale * q_i.k_j) - alibi_h * |i - j|,    cap(x) = softcap * tanh(x / softcap);    i, j: global indices.

Dropout keeps a probability by a hash of (seed, head, i, j), so a result does not depend on how many ranks computed it
(kernels/flash/dropout.py). A sink is not here: it is where a ring's running state begins (passes.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Scores:
    """How logits and probabilities are made.

    Attributes:
        scale: of q.k.
        softcap: bound of the logits' absolute value, or None.
        alibi: (H,) slopes in fp32 (fp64 for fp64), or None.
        dropout_p: share of the probabilities that is dropped; the rest is divided by 1 - dropout_p. The lse is that of
            the undropped softmax.
        seeds: (B,) int64, one per batch row; given wherever dropout_p > 0.
    """

    scale: float
    softcap: float | None = None
    alibi: torch.Tensor | None = None
    dropout_p: float = 0.0
    seeds: torch.Tensor | None = None

    @property
    def extras(self) -> tuple[str, ...]:
        """What goes beyond scale * q.k with every probability kept, by the names users give; empty: any kernel can."""
        given = {"softcap": self.softcap, "alibi": self.alibi, "dropout_p": self.dropout_p or None}
        return tuple(name for name, value in given.items() if value is not None)

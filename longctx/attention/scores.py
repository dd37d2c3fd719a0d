"""`Scores`: how a logit is computed from q.k, and how a probability is dropped. Plain data for any backend.

    s_ij = cap(scale * q_i.k_j) - alibi_h * |i - j|,    cap(x) = softcap * tanh(x / softcap);    i, j: global indices.

Dropout keeps a probability by a hash of (seed, head, i, j), so the result does not depend on the number of ranks
(kernels/flash/dropout.py). The sink is not here: it initialises the running result (sink.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Scores:
    """How logits and probabilities are computed.

    Attributes:
        scale: factor of q.k.
        softcap: bound of the logits' absolute value, or None.
        alibi: (H,) slopes in fp32 (fp64 for fp64), or None.
        dropout_p: probability of dropping; what is kept is divided by 1 - dropout_p. The lse is that of the softmax
            before dropout.
        seeds: (B,) int64, one per batch row; required if dropout_p > 0.
    """

    scale: float
    softcap: float | None = None
    alibi: torch.Tensor | None = None
    dropout_p: float = 0.0
    seeds: torch.Tensor | None = None

    @property
    def extras(self) -> tuple[str, ...]:
        """The users' names of what goes beyond scale * q.k without dropout; empty: any kernel can compute it."""
        given = {"softcap": self.softcap, "alibi": self.alibi, "dropout_p": self.dropout_p or None}
        return tuple(name for name, value in given.items() if value is not None)

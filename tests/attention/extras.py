"""Softcap, sink, ALiBi and dropout for the attention tests: each alone and all together."""

from __future__ import annotations

from typing import Any

import torch
from attention import dense

NAMES = ("softcap", "sink", "alibi", "dropout")
TOGETHER = "+".join(NAMES)
"""A name is one of NAMES or several joined by +."""


def make(names: str, heads: int, batch: int, seed: int = 0) -> dense.Extras:
    """Values for `names`, strong enough to show: a cap below most logits' size, a sink above some, half dropped."""
    g = torch.Generator().manual_seed(seed)
    chosen = names.split("+")
    return dense.Extras(
        softcap=1.3 if "softcap" in chosen else None,
        sink=torch.randn(heads, generator=g, dtype=torch.float64) if "sink" in chosen else None,
        alibi=torch.rand(heads, generator=g, dtype=torch.float64) * 0.3 if "alibi" in chosen else None,
        dropout_p=0.4 if "dropout" in chosen else 0.0,
        seeds=torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g) if "dropout" in chosen else None,
    )


def arguments(extras: dense.Extras) -> dict[str, Any]:
    """As block_attention and ring_attention take them."""
    given = extras._asdict()
    given["dropout_seed"] = given.pop("seeds")
    return given

"""The layers to time: softmax by torch's fused attention, ABC and Cottention by ours; and the definition of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import longctx

SLOTS = 64


@dataclass(frozen=True)
class Shape:
    """One row: a causal sequence of ``tokens`` in one batch row."""

    tokens: int
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64


def inputs(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return q (1, H, T, D), k and v (1, G, T, D), s (1, G, T, M), m (H,) and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    size = (shape.tokens, shape.head_dim)
    return {
        "q": draw(1, shape.heads, *size), "k": draw(1, shape.kv_heads, *size), "v": draw(1, shape.kv_heads, *size),
        "s": draw(1, shape.kv_heads, shape.tokens, SLOTS), "m": torch.full((shape.heads,), 0.5, dtype=dtype),
        "grad": draw(1, shape.heads, *size),
    }  # fmt: skip


def sdpa(q: Any, k: Any, v: Any, **_: Any) -> torch.Tensor:
    """Softmax over all earlier tokens, by torch's fused CPU operator."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def abc(q: Any, k: Any, v: Any, s: Any, **_: Any) -> Any:
    """ABC, prefix normaliser, 64 slots."""
    return longctx.abc_attention(q, k, v, s)


def cosine(q: Any, k: Any, v: Any, m: Any, **_: Any) -> Any:
    """Cottention with scaled values."""
    return longctx.cosine_attention(q, k, v, m)


CONTESTANTS: dict[str, Callable[..., torch.Tensor]] = {
    "softmax (SDPA)": sdpa,
    "ABC, 64 slots": abc,
    "Cottention": cosine,
}
USES = {"softmax (SDPA)": "qkv", "ABC, 64 slots": "qkvs", "Cottention": "qkvm"}


def truth(name: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the definition with T × T matrices in fp64."""
    q, k, v, s, m = (given[key].double() for key in "qkvsm")
    k, v, s = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v, s))
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    if name.startswith("softmax"):
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    if name.startswith("ABC"):
        weights = s[:, :, None].masked_fill(~seen[..., None], -torch.inf).softmax(3)  # (B, H, T, J, M)
        slots = torch.einsum("bhtjm,bhtj->bhtm", weights, q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        return torch.einsum("bhtm,bhtjm,bhjd->bhtd", slots.softmax(-1), weights, v)
    counts = torch.arange(1, q.shape[2] + 1, dtype=torch.float64)
    scaled = v * counts[:, None] ** -torch.sigmoid(m)[:, None, None]
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)).masked_fill(~seen, 0) @ scaled


def state_bytes(name: str, shape: Shape) -> int:
    """Return the bytes that a layer caches between two generated tokens: keys and values, or its state; fp32."""
    given = inputs(Shape(min(shape.tokens, 4096), shape.heads, shape.kv_heads, shape.head_dim))
    with torch.no_grad():
        if name.startswith("ABC"):
            _, state = longctx.abc_attention(*(given[key] for key in "qkvs"), return_state=True)  # type: ignore[misc]
        elif name == "Cottention":
            _, state = longctx.cosine_attention(*(given[key] for key in "qkvm"), return_state=True)  # type: ignore[misc]
        else:
            return 2 * shape.kv_heads * shape.tokens * shape.head_dim * 4
    return int(state.nbytes)

"""The variants to train: each has other kinds of layers, everything else is equal."""

from __future__ import annotations

from typing import Any

LAYERS = 4
SIZES = (32, 64)


def _abc(slots: int, control: str) -> dict[str, Any]:
    return {"*": {"abc": {"slots": slots, "control": control}}}


VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    **{f"abc-{control}-{n}": _abc(n, control) for n in SIZES for control in ("mlp", "window", "random", "linformer")},
    "cottention": {"*": "cosine"},
    "hybrid": {"*": {"abc": {"slots": 64}}, str(LAYERS - 1): "ring"},
}
"""name -> `attention.layers`; the hybrid has one softmax layer in four"""

CLAIMS = [
    (f"abc-mlp-{n}", f"abc-{other}-{n}", f"ABC's learned control against {other} at {n} slots")
    for n in SIZES
    for other in ("random", "linformer", "window")
]
CLAIMS += [(name, "softmax", f"{name} against softmax") for name in ("abc-mlp-64", "cottention", "hybrid")]
"""(a, b, what): losses of a minus losses of b, seed by seed"""

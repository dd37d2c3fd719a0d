"""Every numeric tolerance of the test suite, with its reason. Nothing loosens them: no retry, no environment."""

from __future__ import annotations

# name: (value, reason)
_TABLE: dict[str, tuple[float, str]] = {
    "fp64": (1e-10, "fp64 arithmetic in another order of summation; thousands of terms of size one"),
    "fp16": (4e-3, "fused kernels round probabilities and their gradients to fp16 (2^-11) before products; relative"),
    "bf16": (2e-2, "as fp16, of which bf16 has three bits fewer (2^-8); relative"),
    "fp32": (1e-5, "fp32 arithmetic in another order of summation, relative to the largest value"),
    "training loss": (1e-5, "fp32, 20 optimizer steps on ranks against one process; relative"),
    "printed loss": (1e-3, "what a page says a run prints: fp32 sums of another processor, over ten steps; relative"),
    "training norm": (1e-5, "as the loss"),
    "training gradient": (1e-5, "fp32 sums over ranks in another order; of each tensor's norm"),
    "training weight": (1e-5, "after 20 steps; of each tensor's norm"),
    "bf16 result": (2e-2, "results rounded to bf16 once (2^-9), from probabilities in fp32; of the largest value"),
    "bf16 ratio": (2.0, "error against fp64 truth, relative to one device in bf16: a ring rounds each block once more"),
    "bf16 training loss": (1e-2, "bf16 weights and activations (2^-8 each) over six steps, against fp32; relative"),
    "fp16 training": (2e-2, "fp16 weights, activations and gradients (2^-11 each) of six steps, of their whole change"),
    "float32 divisor": (1e-7, "one fp32 rounding (6e-8): the token count divided by is held in fp32"),
    "model": (1e-5, "whole models: norms, softmax and rotary angles of transformers are fp32 inside, even in fp64"),
    "any model": (3e-5, "gradients of any class: a dozen fp32 norms a layer; a wrong position or mask makes 1e-3"),
}


def tolerance(name: str) -> float:
    """Return a tolerance by its name in the table."""
    return _TABLE[name][0]

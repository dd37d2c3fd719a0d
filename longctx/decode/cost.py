"""Bytes cached by keys and values and by hidden states (EL), and the choice between them (docs/methods/el.md "Cost").

keys and values    2 * layers * rows * tokens * G * D    rows = batch * beams; the prompt's batch if beams share it
hidden states      layers * rows * tokens * width        rows = batch for the prompt, batch * beams after it
cross attention    2 * layers * rows * source * G * D    with EL: batch * source * width, once for all layers
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder's attention and of one generation. width: of W_k's input; source: encoder tokens."""

    layers: int
    heads: int
    key_heads: int
    head_dim: int
    width: int
    batch: int
    beams: int = 1
    prompt: int = 0
    generated: int = 0
    source: int = 0
    element_bytes: int = 2


def kv_bytes(shape: Shape, *, shared_prompt: bool = False) -> int:
    """Return the bytes of cached keys and values, including cross attention's."""
    rows = shape.batch * shape.beams
    prompt_rows = shape.batch if shared_prompt else rows
    tokens = prompt_rows * (shape.prompt + shape.source) + rows * shape.generated
    return 2 * shape.layers * shape.key_heads * shape.head_dim * tokens * shape.element_bytes


def el_bytes(shape: Shape) -> int:
    """Return the bytes of layer inputs, the prompt's once for all beams, and of one copy of the encoder's output."""
    own = shape.layers * shape.batch * (shape.prompt + shape.beams * shape.generated)
    return (own + shape.batch * shape.source) * shape.width * shape.element_bytes


def read_flops(shape: Shape, *, el: bool) -> int:
    """Return the FLOPs of one token's attention to everything cached, including the expansion of EL's queries."""
    tokens = shape.prompt + shape.generated + shape.source
    if not el:
        return 4 * shape.layers * shape.heads * shape.head_dim * tokens
    expand = 4 * shape.heads * shape.head_dim * shape.width
    return shape.layers * (4 * shape.heads * shape.width * tokens + expand)


class CacheChoice(NamedTuple):
    """The chosen method, "kv" or "el", and the reason."""

    method: str
    reason: str


def choose(
    shape: Shape,
    *,
    memory: int | None = None,
    seconds_per_byte: float = 0.0,
    seconds_per_flop: float = 1.0,
    shared_prompt: bool = True,
) -> CacheChoice:
    """Choose the faster method that fits in ``memory`` bytes; EL only if it saves bytes.

    The predicted time of a step is the larger of reading the cache once and of the arithmetic. The default rates are
    those of a compute-bound processor, where EL is chosen only to save memory.

    Args:
        shared_prompt: keys and values of the prompt are stored once for all beams.
    """
    keys, hidden = kv_bytes(shape, shared_prompt=shared_prompt), el_bytes(shape)
    held = f"keys and values take {size(keys)}, hidden states {size(hidden)}"
    if hidden >= keys:
        return CacheChoice("kv", f"{held}: nothing to save")
    if memory is not None and keys > memory:
        what = "only the latter fit in" if hidden <= memory else "neither fits in"
        return CacheChoice("el", f"{held}: {what} {size(memory)}")
    rows = shape.batch * shape.beams
    kv_time, el_time = (
        max(kept * seconds_per_byte, rows * read_flops(shape, el=el) * seconds_per_flop)
        for kept, el in ((keys, False), (hidden, True))
    )
    if el_time < kv_time:
        return CacheChoice("el", f"{held}, and are read in {el_time / kv_time:.2f} of the time")
    ratio = read_flops(shape, el=True) / read_flops(shape, el=False)
    return CacheChoice("kv", f"{held}; both fit, and reading the latter takes {ratio:.0f} times the arithmetic")


def size(count: int) -> str:
    """Format a number of bytes with its unit."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count} bytes"

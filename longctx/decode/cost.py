"""How many bytes a generation keeps, by method, and which method to take (docs/methods/el.md "Cost").

keys and values    2 * layers * rows * tokens * G * D            rows = batch * beams
the same, prompt once a beam group                               rows = batch for the prompt, batch * beams after it
hidden states      layers * rows * tokens * width                the prompt once a beam group
cross attention    2 * layers * rows * source * G * D   against   batch * source * width, once for all
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Shape:
    """A decoder's attention and one generation with it. `width`: what feeds W_k; `source`: tokens of an encoder."""

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
    """Cached keys and values, cross attention's included."""
    rows = shape.batch * shape.beams
    prompt_rows = shape.batch if shared_prompt else rows
    tokens = prompt_rows * (shape.prompt + shape.source) + rows * shape.generated
    return 2 * shape.layers * shape.key_heads * shape.head_dim * tokens * shape.element_bytes


def el_bytes(shape: Shape) -> int:
    """Cached layer inputs, the prompt once for all beams, and the encoder's output once for everything."""
    own = shape.layers * shape.batch * (shape.prompt + shape.beams * shape.generated)
    return (own + shape.batch * shape.source) * shape.width * shape.element_bytes


def read_flops(shape: Shape, *, el: bool) -> int:
    """Multiply-adds x 2 of one token's attention over everything kept, projections of EL's queries included."""
    tokens = shape.prompt + shape.generated + shape.source
    if not el:
        return 4 * shape.layers * shape.heads * shape.head_dim * tokens
    expand = 4 * shape.heads * shape.head_dim * shape.width
    return shape.layers * (4 * shape.heads * shape.width * tokens + expand)


class Choice(NamedTuple):
    """A method, "kv" or "el", and why."""

    method: str
    reason: str


def choose(
    shape: Shape,
    *,
    memory: int | None = None,
    seconds_per_byte: float = 0.0,
    seconds_per_flop: float = 1.0,
    shared_prompt: bool = True,
) -> Choice:
    """Choose the faster of the methods that fit in ``memory`` bytes; EL only where it saves any.

    A step's time is taken as the slower of reading the cache once and of its arithmetic. The defaults are a processor
    on which arithmetic decides, so EL is chosen there for memory alone.

    Args:
        shared_prompt: keys and values of the prompt are kept once for all beams.
    """
    keys, hidden = kv_bytes(shape, shared_prompt=shared_prompt), el_bytes(shape)
    held = f"keys and values take {size(keys)}, hidden states {size(hidden)}"
    if hidden >= keys:
        return Choice("kv", f"{held}: nothing to save")
    if memory is not None and keys > memory:
        what = "only the latter fit in" if hidden <= memory else "neither fits in"
        return Choice("el", f"{held}: {what} {size(memory)}")
    rows = shape.batch * shape.beams
    kv_time, el_time = (
        max(kept * seconds_per_byte, rows * read_flops(shape, el=el) * seconds_per_flop)
        for kept, el in ((keys, False), (hidden, True))
    )
    if el_time < kv_time:
        return Choice("el", f"{held}, and are read in {el_time / kv_time:.2f} of the time")
    ratio = read_flops(shape, el=True) / read_flops(shape, el=False)
    return Choice("kv", f"{held}; both fit, and reading the latter takes {ratio:.0f} times the arithmetic")


def size(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count} bytes"

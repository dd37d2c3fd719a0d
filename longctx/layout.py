"""Which token of the global sequence is on which rank: index arithmetic, without torch and communication.

A layout defines ``spans``: the global indices of a ring member's tokens, in local order, as a few arithmetic
progressions. Masks, sharding, positions and the data loader all take their indices from here, so they agree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from longctx.errors import LayoutError


class Span(NamedTuple):
    """The global indices ``start, start + stride, …`` (``count`` of them), contiguous in local memory."""

    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    stride: int = 1

    def slice(self, offset: int, count: int) -> Span:
        """Return the ``count`` indices that begin at local ``offset`` of this span."""
        return Span(self.start + offset * self.stride, count, self.stride)

    @property
    def last(self) -> int:
        """The largest global index of the span."""
        return self.start + (self.count - 1) * self.stride


class Layout(ABC):
    """How a padded sequence is sharded over ``ring`` members; see the three subclasses."""

    name: ClassVar[str]
    chunks_per_rank: ClassVar[int] = 1

    def multiple(self, ring: int, ulysses: int = 1) -> int:
        """Return the number that padded lengths must be a multiple of."""
        return self.chunks_per_rank * ring * ulysses

    def padded_length(self, length: int, ring: int, ulysses: int = 1) -> int:
        """Return the smallest valid length that is at least ``length``, with one token per chunk or more.

        Raises:
            LayoutError: ``length`` is not positive.
        """
        if length < 1:
            raise LayoutError(f"sequence length {length}: a sequence needs at least one token")
        multiple = self.multiple(ring, ulysses)
        return -(-length // multiple) * multiple

    @abstractmethod
    def spans(self, ring_rank: int, ring: int, padded_length: int) -> tuple[Span, ...]:
        """Return the global indices that ring member ``ring_rank`` holds, in local order.

        Raises:
            LayoutError: ``padded_length`` is not a multiple of ``multiple(ring)``.
        """

    def member_spans(
        self, ring_rank: int, ring: int, ulysses_rank: int, ulysses: int, padded_length: int
    ) -> tuple[Span, ...]:
        """Return the indices of one rank: the ring member's local sequence, split contiguously over its ulysses
        members, so that the all-to-all from heads to sequence restores that local sequence."""
        self._check(ring * ulysses, padded_length)
        part = padded_length // (ring * ulysses)
        begin, end = ulysses_rank * part, (ulysses_rank + 1) * part
        result, offset = [], 0
        for span in self.spans(ring_rank, ring, padded_length):
            first, last = max(begin - offset, 0), min(end - offset, span.count)
            if first < last:
                result.append(span.slice(first, last - first))
            offset += span.count
        return tuple(result)

    def _check(self, parts: int, padded_length: int) -> None:
        multiple = self.chunks_per_rank * parts
        if padded_length < 1 or padded_length % multiple:
            raise LayoutError(
                f"{self.name} layout over {parts} ranks: padded length {padded_length} is not a positive multiple of "
                f"{multiple}; use padded_length()"
            )

    def __repr__(self) -> str:
        return f"Layout({self.name!r})"


class Contiguous(Layout):
    """Rank r holds the r-th of ``ring`` equal chunks. The last rank has (2R − 1)/R of the mean causal work."""

    name = "contiguous"

    def spans(self, ring_rank: int, ring: int, padded_length: int) -> tuple[Span, ...]:
        self._check(ring, padded_length)
        chunk = padded_length // ring
        return (Span(ring_rank * chunk, chunk),)


class Zigzag(Layout):
    """Rank r holds chunks r and 2R − 1 − r of 2R: causal work is equal on every rank and in every ring step."""

    name = "zigzag"
    chunks_per_rank = 2

    def spans(self, ring_rank: int, ring: int, padded_length: int) -> tuple[Span, ...]:
        self._check(ring, padded_length)
        chunk = padded_length // (2 * ring)
        if ring == 1:
            return (Span(0, padded_length),)
        return (Span(ring_rank * chunk, chunk), Span((2 * ring - 1 - ring_rank) * chunk, chunk))


class Striped(Layout):
    """Rank r holds tokens r, r + R, r + 2R, … (Striped Attention): every block is causal (a triangle)."""

    name = "striped"

    def spans(self, ring_rank: int, ring: int, padded_length: int) -> tuple[Span, ...]:
        self._check(ring, padded_length)
        return (Span(ring_rank, padded_length // ring, ring),)


_LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Contiguous(), Zigzag(), Striped())}


def get_layout(layout: str | Layout) -> Layout:
    """Return the layout of that name.

    Raises:
        LayoutError: no such layout.
    """
    if isinstance(layout, Layout):
        return layout
    if layout not in _LAYOUTS:
        raise LayoutError(f"layout {layout!r} is unknown; use one of {', '.join(map(repr, _LAYOUTS))}")
    return _LAYOUTS[layout]

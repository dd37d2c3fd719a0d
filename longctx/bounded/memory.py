"""A memory that travels over the chunks of a block, forwards as a state and backwards as its gradient.

    after_c = close_c (carry_c before_c + local_c)          before_{c+1} = after_c

Factors are (B, G, chunks, 1, M) or None (1), memories (B, G, M, D). Cottention's memory has no factors at all.
"""

from __future__ import annotations

import torch

from longctx.bounded.chunks import times


def forwards(
    memory: torch.Tensor,
    local: torch.Tensor,
    carry: torch.Tensor | None,
    close: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory before every chunk (B, G, chunks, M, D), and after the last; `local` (B, G, chunks, M, D),
    which is used up."""
    carry, close = _column(carry), _column(close)
    return _walk(memory, _scale(local, close), _product(_product(carry, kept), close), down=False)


def backwards(
    gradient: torch.Tensor,
    local: torch.Tensor,
    carry: torch.Tensor | None,
    close: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of every chunk's carry before + local, (B, G, chunks, M, D), and of the memory before the first.

    `gradient` is that of the memory after the last chunk; `local` what the reads of each chunk add to the gradient of
    carry * before, and is used up.
    """
    carry, close = _column(carry), _column(close)
    after, first = _walk(gradient, _scale(local, carry), _product(_product(carry, kept), close), down=True)
    return _scale(after, close), first


def _walk(
    start: torch.Tensor, added: torch.Tensor, fade: torch.Tensor | None, down: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x becomes fade_c x + added_c, chunk by chunk (from the last, if `down`): every chunk's x before that, the last x.

    One operator a chunk, for it is what a short sequence waits for.
    """
    met = torch.empty_like(added)
    slots = [*met.unbind(2), torch.empty_like(start)]
    writes = added.unbind(2)
    fades = None if fade is None else fade.unbind(2)
    if down:
        slots = [*slots[-2::-1], slots[-1]]
        writes, fades = writes[::-1], None if fades is None else fades[::-1]
    slots[0].copy_(start)
    for step, write in enumerate(writes):
        if fades is None:
            torch.add(slots[step], write, out=slots[step + 1])
        else:
            torch.addcmul(write, slots[step], fades[step], out=slots[step + 1])
    return met, slots[-1]


def _scale(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """x * factor, in place."""
    return x if factor is None else x.mul_(factor)


def _product(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else times(a, b)


def _column(factor: torch.Tensor | None) -> torch.Tensor | None:
    return None if factor is None else factor.transpose(-1, -2)

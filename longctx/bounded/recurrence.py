"""Carry a state over the chunks of a block: forward as the state, backward as its gradient.

    after_c = close_c (carry_c before_c + local_c)          before_{c+1} = after_c

Factors are (B, G, chunks, 1, M) or None (1), states (B, G, M, D). Cottention has no factors.
"""

from __future__ import annotations

import torch

from longctx.bounded.chunks import times


def forwards(
    state: torch.Tensor,
    local: torch.Tensor,
    carry: torch.Tensor | None,
    close: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the state before every chunk (B, G, chunks, M, D), and after the last chunk.

    Args:
        local: (B, G, chunks, M, D), what each chunk writes; overwritten.
        kept: 0 where the state is dropped because a chunk ends in another document.
    """
    carry, close = _column(carry), _column(close)
    return _accumulate(state, _scale(local, close), _product(_product(carry, kept), close), reverse=False)


def backwards(
    gradient: torch.Tensor,
    local: torch.Tensor,
    carry: torch.Tensor | None,
    close: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of carry_c before_c + local_c for every chunk, and of the state before the first chunk.

    Args:
        gradient: (B, G, M, D), of the state after the last chunk.
        local: (B, G, chunks, M, D), the gradient of carry_c before_c from the reads of chunk c; overwritten.
    """
    carry, close = _column(carry), _column(close)
    after, first = _accumulate(gradient, _scale(local, carry), _product(_product(carry, kept), close), reverse=True)
    return _scale(after, close), first


def _accumulate(
    start: torch.Tensor, added: torch.Tensor, decay: torch.Tensor | None, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Iterate x = decay_c x + added_c over the chunks (from the last, if `reverse`).

    Returns:
        x before each step, and the last x. One operator per chunk, since launch time dominates on short sequences.
    """
    before = torch.empty_like(added)
    slots = [*before.unbind(2), torch.empty_like(start)]
    writes = added.unbind(2)
    decays = None if decay is None else decay.unbind(2)
    if reverse:
        slots = [*slots[-2::-1], slots[-1]]
        writes, decays = writes[::-1], None if decays is None else decays[::-1]
    slots[0].copy_(start)
    for step, write in enumerate(writes):
        if decays is None:
            torch.add(slots[step], write, out=slots[step + 1])
        else:
            torch.addcmul(write, slots[step], decays[step], out=slots[step + 1])
    return before, slots[-1]


def _scale(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """x * factor, in place."""
    return x if factor is None else x.mul_(factor)


def _product(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else times(a, b)


def _column(factor: torch.Tensor | None) -> torch.Tensor | None:
    return None if factor is None else factor.transpose(-1, -2)

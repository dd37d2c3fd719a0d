"""States carried over chunks equal a loop over the chunks, and their gradients those of autograd."""

from __future__ import annotations

import pytest
import torch
from bounded import direct

from longctx.bounded import recurrence

from tolerances import tolerance

CHUNKS = 5
SHAPES = {"carry": (2, 3, CHUNKS, 1, 4), "close": (2, 3, CHUNKS, 1, 4), "kept": (2, 1, CHUNKS, 1, 1)}


def make(present: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor | None]]:
    """Return the state before, what each chunk writes, and the factors; the absent ones are None."""
    g = torch.Generator().manual_seed(0)
    state, local = (torch.randn(shape, generator=g).double() for shape in ((2, 3, 4, 6), (2, 3, CHUNKS, 4, 6)))
    factors = {name: torch.rand(shape, generator=g).double() for name, shape in SHAPES.items()}
    factors["kept"] = factors["kept"].round()
    return state, local, {name: factors[name] if name in present else None for name in SHAPES}


def loop(state: torch.Tensor, local: torch.Tensor, carry: object, close: object, kept: object) -> list[torch.Tensor]:
    """Return the state before each chunk and after the last, stacked, and what is carried into each chunk."""
    before, carried = [state], []
    for chunk in range(CHUNKS):

        def factor(x: object, chunk: int = chunk) -> torch.Tensor:
            return torch.ones(()) if x is None else x[:, :, chunk].transpose(-1, -2)  # type: ignore[index]

        carried.append(factor(carry) * before[-1])
        before.append(factor(close) * (factor(kept) * carried[-1] + local[:, :, chunk]))
    return [torch.stack(before, 2), torch.stack(carried, 2)]


@pytest.mark.parametrize("present", [(), ("kept",), ("carry", "close"), ("carry", "close", "kept"), ("carry",)])
def test_states_and_gradients_are_those_of_a_loop(present: tuple[str, ...]) -> None:
    state, local, factors = make(present)
    leaves = [state.requires_grad_(), local.requires_grad_()]
    states, carried = loop(state, local, *factors.values())
    before, after = recurrence.forwards(state.detach(), local.detach().clone(), *factors.values())
    assert max(direct.differences([before, after], [states[:, :, :-1], states[:, :, -1]])) <= tolerance("fp64")
    # The loss reads the state after the last chunk, and in every chunk what is carried into it.
    last, reads = torch.randn_like(state), torch.randn_like(local)
    loss = (states[:, :, -1] * last).sum() + (carried * reads).sum()
    first, written = torch.autograd.grad(loss, leaves)
    found = recurrence.backwards(last, reads.clone(), *factors.values())
    assert max(direct.differences(list(found), [written, first])) <= tolerance("fp64")

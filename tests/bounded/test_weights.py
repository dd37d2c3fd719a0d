"""Write weights in single precision: what a token reads does not depend on how much later tokens write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bounded import direct

from longctx.bounded.abc.operator import abc_attention

from tolerances import tolerance

LEVELS = torch.tensor([-torch.inf, -130.0, -1.0, 0.0, 1.0, 150.0])
SCALE = 0.7


def make(seed: int, length: int = 37) -> tuple[list[torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=g) for shape in ((2, 4, length, 5), (2, 2, length, 5), (2, 2, length, 3)))
    s = LEVELS[torch.randint(0, len(LEVELS), (2, 2, length, 4), generator=g)]
    return [q, k, v, s], torch.randn(2, 4, length, 3, generator=g)


def answer(run: Callable[..., torch.Tensor], leaves: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out))]


@pytest.mark.parametrize("normalizer", ["prefix", "running"])
@pytest.mark.parametrize("docs", [False, True])
def test_neighbours_of_very_different_mass(normalizer: str, docs: bool) -> None:
    """Slots with no mass, almost none, and e^150 in adjacent tokens: fp32 equals the definition in fp64."""
    for seed in range(12):
        leaves, weight = make(seed)
        ids = direct.random_documents(2, 37, torch.Generator().manual_seed(seed)) if docs else None
        seen = direct.visible(37, ids)

        def ours(*x: torch.Tensor, ids: torch.Tensor | None = ids) -> torch.Tensor:
            return abc_attention(*x, normalizer=normalizer, scale=SCALE, document_ids=ids)  # type: ignore[return-value]

        def theirs(*x: torch.Tensor, seen: torch.Tensor = seen) -> torch.Tensor:
            return direct.abc(*x, x[3], seen, normalizer, SCALE)

        found, expected = answer(ours, leaves, weight), answer(theirs, [x.double() for x in leaves], weight)
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).abs().max()) <= tolerance("fp32") * float(b.abs().max()), seed


def test_later_tokens_do_not_change_earlier_outputs() -> None:
    """An almost empty slot is read exactly, whatever the next token writes into it."""
    (q, k, v, _), _ = make(0, 8)
    for place in range(1, 7):
        s = torch.zeros(2, 2, 8, 4)
        s[:, :, place, 0], s[:, :, place + 1, 0] = -torch.inf, 150.0
        whole = abc_attention(q, k, v, s)
        alone = abc_attention(*(x[:, :, : place + 1] for x in (q, k, v, s)))
        assert float((whole[:, :, : place + 1] - alone).abs().max()) <= tolerance("fp32"), place

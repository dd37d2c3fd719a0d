"""Cottention by chunks as a torch.library operator: opcheck, compilation without a break, checkpoints that keep it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bounded import direct
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longctx.bounded.cosine.operator import cosine_attention

from tolerances import tolerance

IDS = direct.packed([[(-1, 5), (0, 30), (1, 35)], [(2, 40), (-1, 2), (3, 28)]])


def inputs() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 70, 5), (2, 2, 70, 5), (2, 2, 70, 3), (4,)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("on_query", [False, True])
def test_opcheck(on_query: bool) -> None:
    q, k, v, _ = inputs()
    size = torch.rand(2, 4 if on_query else 2, 70, dtype=torch.float64).requires_grad_()
    state = torch.randn(2, 2, 5, 3, dtype=torch.float64).requires_grad_()
    packed = (IDS, torch.tensor([0, 3])) if on_query else (None, None)
    settings = {"on_query": on_query, "chunk": 16}
    torch.library.opcheck(torch.ops.longctx.cosine_chunks.default, (q, k, v, size, state, *packed), settings)


def test_compiled_without_a_break() -> None:
    leaves = inputs()

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        found = cosine_attention(*tensors, document_ids=IDS)
        assert isinstance(found, torch.Tensor)
        return found * 2

    answers = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out = function(*leaves)
        answers.append([out, *direct.gradients(out, torch.ones_like(out), leaves)])
    assert max(direct.differences(*answers)) <= tolerance("fp64")


def test_a_checkpoint_that_keeps_the_operator_computes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from longctx.bounded.cosine import chunks as cosine_chunks

    calls = []
    plain = cosine_chunks._CosineWalk.forward
    monkeypatch.setattr(cosine_chunks._CosineWalk, "forward", lambda *x: calls.append(1) or plain(*x))

    def policy(_: object, operator: object, *arguments: object, **names: object) -> CheckpointPolicy:
        keep = operator == torch.ops.longctx.cosine_chunks.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    leaves = inputs()
    answers = []
    for context in (None, partial(create_selective_checkpoint_contexts, policy)):
        calls.clear()
        more = {} if context is None else {"context_fn": context}
        out = checkpoint(cosine_attention, *leaves, use_reentrant=False, **more)
        answers.append([out, *direct.gradients(out, torch.ones_like(out), leaves), len(calls)])
    assert max(direct.differences(answers[0][:-1], answers[1][:-1])) <= tolerance("fp64")
    assert answers[0][-1] == 2 * answers[1][-1]

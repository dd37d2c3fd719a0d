"""Cottention by chunks: token by token, and as a torch.library operator that compiles and that checkpoints can keep."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bounded import direct
from bounded.inputs import PACKED, leaf, of_cosine
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longctx.bounded.cosine import chunks
from longctx.bounded.cosine.operator import cosine_attention
from longctx.bounded.state import CosineState
from longctx.kernels.cosine import reference

from tolerances import tolerance

IDS = direct.packed([[(-1, 5), (0, 30), (1, 35)], [(2, 40), (-1, 2), (3, 28)]])


def inputs() -> list[torch.Tensor]:
    return of_cosine(length=70)[0]


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
    calls = []
    plain = chunks._CosineWalk.forward
    monkeypatch.setattr(chunks._CosineWalk, "forward", lambda *x: calls.append(1) or plain(*x))

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


@pytest.mark.parametrize("scale_on", ["value", "query"])
@pytest.mark.parametrize("docs", [False, True])
def test_states_and_their_gradients(scale_on: str, docs: bool) -> None:
    """Chunked equals token by token, from a state to a state."""
    leaves, weight, g = of_cosine(groups=4)
    documents, document = (PACKED, torch.tensor([4, 1])) if docs else (None, None)
    memory = leaf(g, 2, 4, 5, 3)
    count = torch.tensor([3, 5])
    out, after, counted, last = reference.recurrent(*leaves, memory, count, documents, document, scale_on=scale_on)
    ours, state = cosine_attention(
        *leaves, scale_on=scale_on, document_ids=documents, state=CosineState(memory, count, document),
        return_state=True,
    )  # fmt: skip
    assert state.count.equal(counted) and (last is None or state.document.equal(last))
    more = torch.randn(after.shape, generator=g, dtype=torch.float64)
    both = [
        [o, s, *torch.autograd.grad((o * weight).sum() + (s * more).sum(), [*leaves, memory])]
        for o, s in ((ours, state.memory), (out, after))
    ]
    assert max(direct.differences(*both)) <= tolerance("fp64")


def test_gradients_through_unit_rows() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    rows, norm = chunks.unit(x.detach())
    assert direct.differences([rows, norm], [x / x.norm(dim=1, keepdim=True), x.norm(dim=1, keepdim=True)])[0] <= 1e-15
    gradient = torch.randn_like(rows)
    (expected,) = torch.autograd.grad((x / x.norm(dim=1, keepdim=True) * gradient).sum(), x)
    assert direct.differences([chunks.through_unit(gradient.clone(), rows, norm)], [expected])[0] <= tolerance("fp64")
    assert not chunks.unit(torch.zeros(1, 3))[0].any()

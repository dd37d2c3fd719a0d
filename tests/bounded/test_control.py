"""ABC's control strategies equal their definitions, and the state of each continues its sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounded import direct

from longctx.bounded.abc import clusters, control
from longctx.bounded.abc.operator import abc_attention
from longctx.errors import AttentionError

from tolerances import tolerance

EXACT = tolerance("fp64")
PACKED = direct.packed([[(-1, 3), (4, 17), (5, 10), (-1, 7)], [(2, 1), (3, 8), (-1, 3), (7, 25)]])


def make(length: int = 37, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, length, 5), (2, 2, length, 5), (2, 2, length, 3)]
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]
    return leaves, torch.randn(2, 4, length, 3, generator=g, dtype=torch.float64)


def places(documents: torch.Tensor | None, length: int = 37) -> torch.Tensor:
    """(B or 1, T): each token's place in its document."""
    return direct.counts(direct.visible(length, documents)) - 1


@pytest.mark.parametrize("documents", [None, PACKED])
def test_queues(documents: torch.Tensor | None) -> None:
    """What each of them sees, token by token, in one softmax."""
    (q, k, v), weight = make()
    seen, index = direct.visible(37, documents), places(documents)
    age = index[:, :, None] - index[:, None]
    ends = (index + 1)[:, None] % 4 == 0
    cases: list[tuple[control.Control, torch.Tensor, Any]] = [
        (control.window(1), seen & (age < 1), None),
        (control.window(5), seen & (age < 5), None),
        (control.window(50), seen, None),
        (control.dilated(3, 4), seen & ((age == 0) | (ends & (age >= 1) & (age <= 8))), None),
        (control.dilated(3, 1), seen & (age < 3), None),
        (control.dilated(1, 4), seen & (age < 1), None),
    ]
    means = [torch.stack([x[:, :, max(t - 3, 0) : t + 1].mean(2) for t in range(37)], 2) for x in (k, v)]
    cases.append((control.compressive(6, 4), seen & (age < 3), (*means, seen & ends & (age >= 3) & (age < 3 + 3 * 4))))
    for strategy, sees, extra in cases:
        expected = direct.queue(q, k, v, sees, 0.7, extra)
        ours = abc_attention(q, k, v, strategy, scale=0.7, document_ids=documents)
        both = [[o, *direct.gradients(o, weight, [q, k, v])] for o in (ours, expected)]
        assert max(direct.differences(*both)) <= EXACT, strategy


def test_dilated_is_a_queue_that_shifts_at_every_rate_th_step() -> None:
    """The recurrence itself: the newest slot is overwritten, and the queue moves on after every fourth token."""
    (q, k, v), _ = make()
    queue: list[int] = []
    outs = []
    for t in range(37):
        queue = [*queue[:-1], t] if queue and t % 4 else [*queue, t][-3:]
        p = (0.7 * q[:, ::2, t, None] @ k[:, :, queue].transpose(-1, -2)).softmax(-1)
        outs.append((p @ v[:, :, queue])[:, :, 0])
    ours = abc_attention(q, k, v, control.dilated(3, 4), scale=0.7)
    assert direct.differences([ours[:, ::2]], [torch.stack(outs, 2)])[0] <= EXACT


@pytest.mark.parametrize("documents", [None, PACKED])
def test_linformer_and_random(documents: torch.Tensor | None) -> None:
    (q, k, v), weight = make()
    table = torch.randn(2, 4, 50, dtype=torch.float64).requires_grad_()
    seen, index = direct.visible(37, documents), places(documents).expand(2, -1).clamp_min(0)
    columns = table.permute(2, 0, 1)[index].transpose(1, 2)
    expected = direct.abc(q, k, v, columns, columns, seen, "sum", 0.7)
    ours = abc_attention(q, k, v, control.linformer(table), scale=0.7, document_ids=documents)
    leaves = [q, k, v, table]
    both = [[o, *direct.gradients(o, weight, leaves)] for o in (ours, expected)]
    assert max(direct.differences(*both)) <= EXACT
    valid = None if documents is None else documents >= 0
    members = control.random(4, 9).control(k, index, valid, True)
    assert ((members == 0).sum(-1) == 1).all(), "every token has one slot"
    for normalizer, s in (("prefix", members), ("sum", members.exp()), ("running", members)):
        expected = direct.abc(q, k, v, s, s, seen, normalizer, 0.7)
        ours = abc_attention(q, k, v, control.random(4, 9), normalizer=normalizer, scale=0.7, document_ids=documents)
        both = [[o, *direct.gradients(o, weight, [q, k, v])] for o in (ours, expected)]
        assert max(direct.differences(*both)) <= EXACT, normalizer


def test_random_slots_are_even_and_differ_by_head_and_seed() -> None:
    k = torch.zeros(1, 2, 8000, 1)
    index = torch.arange(8000)[None]
    slots = [(control.random(8, seed).control(k, index, None, True) == 0).float() for seed in (0, 1)]
    share = slots[0].mean(2)
    assert (share - 1 / 8).abs().max() < 0.02  # five standard deviations of a fair draw
    for a, b in ((slots[0][0, 0], slots[0][0, 1]), (slots[0], slots[1]), (slots[0][:, :, 1:], slots[0][:, :, :-1])):
        assert abs(float((a * b).sum(-1).mean()) - 1 / 8) < 0.03


STRATEGIES = [
    control.random(4, 1), control.identity(40), control.linformer(torch.randn(1, 4, 40, dtype=torch.float64)),
    control.window(7), control.dilated(4, 3), control.compressive(6, 4), control.cluster(3),
]  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("documents", [None, PACKED])
def test_states_continue(strategy: control.Control, documents: torch.Tensor | None) -> None:
    (q, k, v), weight = make()
    expected = abc_attention(q, k, v, strategy, document_ids=documents)
    state, outs, sizes = None, [], set()
    for part in (slice(0, 5), slice(5, 6), slice(6, 30), slice(30, 37)):
        ids = None if documents is None else documents[:, part]
        out, state = abc_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], strategy, document_ids=ids, state=state, return_state=True
        )
        outs.append(out)
        sizes.add(state.nbytes)
    assert len(sizes) == 1, "a state does not grow"
    both = [[o, *direct.gradients(o, weight, [q, k, v])] for o in (torch.cat(outs, 2), expected)]
    assert max(direct.differences(*both)) <= EXACT


HOLES = direct.packed(
    [[(3, 4), (-1, 3), (3, 9), (-1, 8), (3, 2), (4, 2), (-1, 2), (4, 7)], [(-1, 2), (1, 1), (-1, 30), (1, 4)]]
)
"""Padding inside documents, longer than a queue, at both ends of cuts."""


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
def test_padding_takes_no_place(strategy: control.Control) -> None:
    """Padding inside a document is as if it were not there: whole, or in parts of any length from state to state."""
    (q, k, v), weight = make()
    weight = weight.masked_fill((HOLES < 0)[:, None, :, None], 0.0)
    rows = []
    for row, ids in enumerate(HOLES):
        there = (ids >= 0).nonzero()[:, 0]
        out = abc_attention(*(x[row : row + 1, :, there] for x in (q, k, v)), strategy, document_ids=ids[there][None])
        rows.append(torch.zeros(1, 4, 37, 3, dtype=torch.float64).index_copy(2, there, out))
    expected = torch.cat(rows)
    wanted = [expected, *direct.gradients(expected, weight, [q, k, v])]
    for cuts in ([37], [5, 1, 20, 11], [1] * 37):
        state, outs, start = None, [], 0
        for cut in cuts:
            part = slice(start, start + cut)
            out, state = abc_attention(
                *(x[:, :, part] for x in (q, k, v)), strategy, document_ids=HOLES[:, part], state=state,
                return_state=True,
            )  # fmt: skip
            outs.append(out)
            start += cut
        ours = torch.cat(outs, 2)
        assert max(direct.differences([ours, *direct.gradients(ours, weight, [q, k, v])], wanted)) <= EXACT, cuts


def test_clusters() -> None:
    """Tokens near each other share a slot; bidirectional memories are the clusters' means; the causal ones see no
    later token."""
    g = torch.Generator().manual_seed(0)
    centers = 20 * torch.randn(1, 1, 4, 6, generator=g, dtype=torch.float64)
    truth = torch.cat([torch.arange(4), torch.randint(0, 4, (196,), generator=g)])
    k = centers[:, :, truth] + torch.randn(1, 1, 200, 6, generator=g, dtype=torch.float64)
    index = torch.arange(200)[None]
    nothing = torch.zeros(1, 200, dtype=torch.int64)
    online, *_ = clusters.follow(k, index, nothing, clusters.empty(k, 4), nothing[:, 0])
    assert online[0, 0].equal(truth)
    slot = clusters.assign(k, nothing, 4, 10)[0, 0]
    q, v = torch.randn(1, 1, 200, 6, generator=g, dtype=torch.float64), k * 2
    members = (slot[:, None] == torch.arange(4)).double()
    means = members.T @ k[0, 0] / members.sum(0)[:, None].clamp_min(1)
    logits = (0.1 * q[0, 0] @ means.T).masked_fill(members.sum(0) == 0, -torch.inf)
    ours = abc_attention(q, k, v, control.cluster(4, 10), causal=False, scale=0.1)
    assert direct.differences([ours[0, 0]], [logits.softmax(-1) @ (2 * means)])[0] <= EXACT
    changed = k.clone()
    changed[:, :, 150:] = 0.0
    before, after = (abc_attention(q, x, v, control.cluster(4)) for x in (k, changed))
    assert before[:, :, :150].equal(after[:, :, :150])


def test_strategies_check_their_arguments() -> None:
    for make_one in (lambda: control.random(0), lambda: control.window(-1), lambda: control.dilated(2, 0)):
        with pytest.raises(AttentionError, match="positive integer"):
            make_one()
    with pytest.raises(AttentionError, match="expected \\(G or 1, M, S_max\\)"):
        control.linformer(torch.zeros(3, 4))
    (q, k, v), _ = make()
    with pytest.raises(AttentionError, match="for 2 key heads"):
        abc_attention(q, k, v, control.linformer(torch.zeros(3, 4, 40, dtype=torch.float64)))
    _, state = abc_attention(q, k, v, control.random(4), return_state=True)
    with pytest.raises(AttentionError, match="made by another control"):
        abc_attention(q, k, v, torch.zeros(2, 2, 37, 4, dtype=torch.float64), state=state)
    with pytest.raises(AttentionError, match="made by another control"):
        abc_attention(q, k, v, control.cluster(4), state=state)
    _, state = abc_attention(q, k, v, control.cluster(4), return_state=True)
    with pytest.raises(AttentionError, match="on a ring or after a state: k-means"):
        abc_attention(q, k, v, control.cluster(4), causal=False, state=state)
    with pytest.raises(AttentionError, match="state of 2 rows, and the batch has 1"):
        abc_attention(q[:1], k[:1], v[:1], control.cluster(4), state=state)

"""ABC's queues of tokens attend to the tokens that they hold, and their states to no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounded import direct
from bounded.inputs import PACKED, qkv

from longctx.bounded.abc import control, fifo
from longctx.bounded.abc.operator import abc_attention
from longctx.bounded.arguments import SequenceCall
from longctx.errors import AttentionError

from tolerances import tolerance

EXACT = tolerance("fp64")
QUEUES = [
    control.window(1), control.window(5), control.dilated(3, 4), control.compressive(6, 4), control.compressive(1, 3)
]  # fmt: skip


@pytest.mark.parametrize("documents", [None, PACKED])
def test_queues(documents: torch.Tensor | None) -> None:
    """Each token attends to the tokens, and means of tokens, that its queue holds."""
    (q, k, v), weight, _ = qkv()
    seen = direct.visible(37, documents)
    index = direct.counts(seen) - 1
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
        direct.check(ours, expected, weight, [q, k, v])


def test_dilated_is_a_queue_that_shifts_at_every_rate_th_step() -> None:
    """Against the recurrence: the newest slot is overwritten, and the queue shifts after every fourth token."""
    (q, k, v), *_ = qkv()
    queue: list[int] = []
    outs = []
    for t in range(37):
        queue = [*queue[:-1], t] if queue and t % 4 else [*queue, t][-3:]
        p = (0.7 * q[:, ::2, t, None] @ k[:, :, queue].transpose(-1, -2)).softmax(-1)
        outs.append((p @ v[:, :, queue])[:, :, 0])
    ours = abc_attention(q, k, v, control.dilated(3, 4), scale=0.7)
    assert direct.differences([ours[:, ::2]], [torch.stack(outs, 2)])[0] <= EXACT


@pytest.mark.parametrize("strategy", QUEUES)
def test_a_token_reads_no_further_back_than_the_reach(strategy: control.Fifo) -> None:
    (q, k, v), *_ = qkv(batch=1)
    out = abc_attention(q, k, v, strategy)
    farthest = 0
    for t in range(37):
        (dv,) = torch.autograd.grad(out[:, :, t].sum(), v, retain_graph=True)
        read = dv.abs().sum((0, 1, 3)).nonzero()[:, 0]
        farthest = max(farthest, t - int(read.min()))
    assert max(farthest, 1) == fifo.reach(strategy)


def test_the_state_is_the_last_tokens() -> None:
    """As many as the reach, oldest first; absent ones, of document -1, before them."""
    (q, k, v), *_ = qkv()
    call = SequenceCall(document_ids=PACKED, return_state=True)
    _, state = fifo.attend(q, k, v, control.window(5), call, 1.0)
    assert state is not None and state.document.tolist() == [[5] * 4, [7] * 4]
    assert state.keys[0].equal(k[0, :, 26:30]) and state.values[1].equal(v[1, :, 33:37])
    assert state.index.tolist() == [[6, 7, 8, 9], [21, 22, 23, 24]]
    _, short = fifo.attend(
        q[:, :, :2], k[:, :, :2], v[:, :, :2], control.window(5), SequenceCall(return_state=True), 1.0
    )
    assert short is not None and short.document.tolist() == [[-1, -1, 0, 0]] * 2
    assert short.keys[:, :, 2:].equal(k[:, :, :2]) and not short.keys[:, :, :2].any()


def test_queues_need_an_order() -> None:
    (q, k, v), *_ = qkv()
    with pytest.raises(AttentionError, match="need causal=True"):
        fifo.attend(q, k, v, control.window(5), SequenceCall(causal=False), 1.0)

"""Detect a loss that is a plain mean over one rank's tokens, which is too large by the number of sequence ranks.

``F.cross_entropy`` on a shard's logits is an easy mistake, and its value looks right. In the first windows the engine
compares the loss passed to ``engine.backward`` with such means of the logits that forward returned. It raises only if
they are equal in every micro-batch of all ranks, so that other losses are never rejected.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch

from longctx.engine.step.accumulation import MicroBatchMark
from longctx.engine.step.loss import token_loss_in_chunks
from longctx.engine.step.rows import IGNORED
from longctx.errors import EngineError
from longctx.mesh import Mesh

logger = logging.getLogger(__name__)
RIGHT = (
    "Take the model's own loss, engine(**batch).loss, or engine.token_mean(losses, batch['shift_labels']) for losses "
    "per token (reduction='none'). A loss of gathered values that all ranks of a sequence share: backward(loss, "
    "replicated=True)"
)


class Evidence(NamedTuple):
    """Counts of micro-batches, to be summed over ranks."""

    judged: int = 0
    mean: int = 0  # of the judged ones: loss equals a plain mean
    shifted: int = 0  # of the judged ones: loss equals one with labels shifted twice
    apart: int = 0  # of the judged ones: mean and share have clearly different magnitudes
    near: int = 0  # of those apart: loss has the magnitude of a mean

    def __add__(self, other: Evidence) -> Evidence:  # type: ignore[override]
        return Evidence(*(a + b for a, b in zip(self, other, strict=True)))


@torch.no_grad()
def judge(loss: torch.Tensor, output: Any, place: MicroBatchMark, sequence_size: int, accumulation: int) -> Evidence:
    """Compare a loss with this rank's share and with the usual mistaken means.

    Args:
        loss: () as passed to ``backward``.
        output: of the forward pass; judged only if it has logits (B, T, V).
        sequence_size: ranks per sequence; a mean is ``sequence_size`` times too large.
        accumulation: ``gradient_accumulation_steps``.
    """
    logits, labels, divisor = getattr(output, "logits", None), place.labels, place.divisor
    if logits is None or labels is None or divisor is None or logits.shape[:2] != labels.shape:
        return Evidence()
    if sequence_size == 1 and accumulation == 1:
        return Evidence()  # the average of replicas' means: common practice, so accepted
    given, slack = float(loss), 1e-4 if logits.dtype == torch.float32 else 1e-2
    total, count = token_loss_in_chunks(logits, labels), int((labels != IGNORED).sum())
    share = total / float(divisor)
    if count == 0:
        empty = given != given  # a mean over no token is NaN; a share of it is 0
        return Evidence(int(empty), int(empty))
    means = [total / count] + ([total / count / accumulation] if sequence_size > 1 else [])
    again, left = token_loss_in_chunks(logits[:, :-1], labels[:, 1:]), int((labels[:, 1:] != IGNORED).sum())
    twice = [again / float(divisor)] + ([again / left, again / left / accumulation] if left else [])

    def equal(value: float) -> bool:
        return abs(given - value) <= slack * abs(value) and abs(share - value) > 4 * slack * abs(value)

    if abs(share - means[0]) <= 4 * slack * abs(share) and not any(map(equal, twice)):
        return Evidence()  # share and mean are too close to distinguish
    apart = abs(means[0]) > 1.5 * abs(share)
    near = apart and 1 / 1.25 < given / means[0] < 1.25
    return Evidence(1, int(any(map(equal, means))), int(any(map(equal, twice))), int(apart), int(near))


def token_mean(losses: torch.Tensor, labels: torch.Tensor, place: MicroBatchMark | None) -> torch.Tensor:
    """Return the sum of ``losses`` (B, T) at valid ``labels`` (B, T), divided by the divisor of ``place``'s window.

    Raises:
        EngineError: shapes differ, or there is no divisor.
    """
    if place is None or place.divisor is None:
        raise EngineError(
            "token_mean needs the window of the latest forward pass: give labels to engine.shard, and pass its tensors "
            "to engine(**batch) as they are"
        )
    if losses.shape != labels.shape:
        raise EngineError(
            f"token_mean: losses are {tuple(losses.shape)}, labels {tuple(labels.shape)}; give one loss per token "
            "(reduction='none'), reshaped to (B, T)"
        )
    return losses.float().masked_fill(labels == IGNORED, 0.0).sum() / place.divisor


def settle(found: Evidence, mesh: Mesh, last: bool) -> None:
    """Raise, on every rank, if all judged micro-batches of all ranks show the same mistake.

    Args:
        found: summed over all ranks.
        last: no later window is judged: warn now if losses have the magnitude of means (with label smoothing, say).

    Raises:
        EngineError: with the correct call.
    """
    if found.judged == 0:
        return
    size = mesh.sequence_size
    if found.mean == found.judged:
        times = f"{size} times too large on {size} ranks" if size > 1 else "too large"
        raise EngineError(
            "the loss given to engine.backward is a mean over this rank's own tokens of one micro-batch: gradients and "
            f"the reported loss would be {times}, and tokens of shards with more labels would get less weight. {RIGHT}"
        )
    if found.shifted == found.judged:
        raise EngineError(
            "the loss given to engine.backward compares logits[:, :-1] with labels[:, 1:], but the labels of "
            f"engine.shard are shifted already (on whole rows, before sharding). {RIGHT}"
        )
    if last and found.apart and found.near == found.apart and mesh.rank == 0:
        logger.warning(
            "the loss given to engine.backward is about as large as a mean over one rank's own tokens, and not as this "
            "rank's share of the mean over all of them. If it is such a mean, it is too large by the number of ranks. "
            "%s",
            RIGHT,
        )

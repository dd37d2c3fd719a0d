"""Detect a loss that is a plain mean over one rank's tokens, which is too large by the number of sequence ranks.

``F.cross_entropy`` on a shard's logits is an easy mistake, and its value looks right. In the first accumulation windows
the engine compares the loss passed to ``engine.backward`` with such means of the logits that forward returned. It
raises only if they are equal in every micro-batch of all ranks, so that other losses are never rejected.
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


class MistakeCounts(NamedTuple):
    """Counts of micro-batches, to be summed over ranks."""

    compared: int = 0
    mean: int = 0  # of the compared ones: loss equals a plain mean
    shifted: int = 0  # of the compared ones: loss equals one with labels shifted twice
    distinguishable: int = 0  # of the compared ones: mean and expected loss have clearly different magnitudes
    like_mean: int = 0  # of the distinguishable ones: loss has the magnitude of a mean

    def __add__(self, other: MistakeCounts) -> MistakeCounts:  # type: ignore[override]
        return MistakeCounts(*(a + b for a, b in zip(self, other, strict=True)))


@torch.no_grad()
def compare_loss(
    loss: torch.Tensor, output: Any, mark: MicroBatchMark, sequence_size: int, accumulation: int
) -> MistakeCounts:
    """Compare a loss with the expected one, this rank's share of the mean, and with the usual mistaken means.

    Args:
        loss: () as passed to ``backward``.
        output: of the forward pass; compared only if it has logits (B, T, V).
        sequence_size: ranks per sequence; a mean is ``sequence_size`` times too large.
        accumulation: ``gradient_accumulation_steps``.
    """
    logits, labels, divisor = getattr(output, "logits", None), mark.labels, mark.divisor
    if logits is None or labels is None or divisor is None or logits.shape[:2] != labels.shape:
        return MistakeCounts()
    if sequence_size == 1 and accumulation == 1:
        return MistakeCounts()  # the average of replicas' means: common practice, so accepted
    given, slack = float(loss), 1e-4 if logits.dtype == torch.float32 else 1e-2
    total, count = token_loss_in_chunks(logits, labels), int((labels != IGNORED).sum())
    expected = total / float(divisor)
    if count == 0:
        empty = given != given  # a mean over no token is NaN; the expected loss is 0
        return MistakeCounts(int(empty), int(empty))
    means = [total / count] + ([total / count / accumulation] if sequence_size > 1 else [])
    again, left = token_loss_in_chunks(logits[:, :-1], labels[:, 1:]), int((labels[:, 1:] != IGNORED).sum())
    twice = [again / float(divisor)] + ([again / left, again / left / accumulation] if left else [])

    def equal(value: float) -> bool:
        return abs(given - value) <= slack * abs(value) and abs(expected - value) > 4 * slack * abs(value)

    if abs(expected - means[0]) <= 4 * slack * abs(expected) and not any(map(equal, twice)):
        return MistakeCounts()  # expected loss and mean are too close to distinguish
    distinguishable = abs(means[0]) > 1.5 * abs(expected)
    like_mean = distinguishable and 1 / 1.25 < given / means[0] < 1.25
    return MistakeCounts(
        1, int(any(map(equal, means))), int(any(map(equal, twice))), int(distinguishable), int(like_mean)
    )


def token_mean(losses: torch.Tensor, labels: torch.Tensor, mark: MicroBatchMark | None) -> torch.Tensor:
    """Return the sum of ``losses`` (B, T) at valid ``labels`` (B, T), divided by the divisor of ``mark``.

    Raises:
        EngineError: shapes differ, or there is no divisor.
    """
    if mark is None or mark.divisor is None:
        raise EngineError(
            "token_mean needs the window of the latest forward pass: give labels to engine.shard, and pass its tensors "
            "to engine(**batch) as they are"
        )
    if losses.shape != labels.shape:
        raise EngineError(
            f"token_mean: losses are {tuple(losses.shape)}, labels {tuple(labels.shape)}; give one loss per token "
            "(reduction='none'), reshaped to (B, T)"
        )
    return losses.float().masked_fill(labels == IGNORED, 0.0).sum() / mark.divisor


def raise_if_all_wrong(found: MistakeCounts, mesh: Mesh, last: bool) -> None:
    """Raise, on every rank, if all compared micro-batches of all ranks show the same mistake.

    Args:
        found: summed over all ranks.
        last: losses of later accumulation windows are not compared: warn now if losses have the magnitude of means
            (with label smoothing, say).

    Raises:
        EngineError: with the correct call.
    """
    if found.compared == 0:
        return
    size = mesh.sequence_size
    if found.mean == found.compared:
        times = f"{size} times too large on {size} ranks" if size > 1 else "too large"
        raise EngineError(
            "the loss given to engine.backward is a mean over this rank's own tokens of one micro-batch: gradients and "
            f"the reported loss would be {times}, and tokens of shards with more labels would get less weight. {RIGHT}"
        )
    if found.shifted == found.compared:
        raise EngineError(
            "the loss given to engine.backward compares logits[:, :-1] with labels[:, 1:], but the labels of "
            f"engine.shard are shifted already (on whole rows, before sharding). {RIGHT}"
        )
    if last and found.distinguishable and found.like_mean == found.distinguishable and mesh.rank == 0:
        logger.warning(
            "the loss given to engine.backward is about as large as a mean over one rank's own tokens, and not as this "
            "rank's share of the mean over all of them. If it is such a mean, it is too large by the number of ranks. "
            "%s",
            RIGHT,
        )

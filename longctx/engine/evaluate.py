"""Mean loss over held-out batches, whose number may differ between data replicas.

Under ZeRO-3 a forward pass is collective over all ranks, so a replica that has run out of batches must not stop. It
runs a row of padding, which adds no tokens, until all replicas have finished.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch

from longctx.engine.exchange import exchange
from longctx.engine.step.loss import token_loss
from longctx.engine.step.rows import IGNORED, Batch
from longctx.engine.step.window import row_checksum, shard_rows
from longctx.errors import EngineError
from longctx.layout import Layout
from longctx.mesh import Mesh
from longctx.models.hook.positions import PositionRule
from longctx.models.modes import evaluating


class EvaluatedEngine(Protocol):
    """The part of an engine that an evaluation needs."""

    module: Any
    mesh: Mesh
    layout: Layout
    global_steps: int

    @property
    def position_rule(self) -> PositionRule: ...

    def __call__(self, **batch: Any) -> Any: ...


class Evaluation(NamedTuple):
    """Mean loss over ``tokens`` valid tokens, the same on every rank; NaN if there are none."""

    loss: float
    tokens: int


def evaluate(engine: EvaluatedEngine, batches: Iterable[Batch], *, sharded: bool) -> Evaluation:
    """Run ``batches`` in eval mode without gradients, then restore each module's mode. Collective over the world.

    Raises:
        EngineError: on every rank, if a batch of any rank has no labels or is rejected.
    """
    total = torch.zeros(2, dtype=torch.float64, device=engine.mesh.device)
    _ = engine.position_rule  # collective, so before the loop: ranks without a batch take part too
    iterator = iter(batches)
    with evaluating(engine.module), torch.no_grad():
        while (batch := _next(iterator, engine, sharded)) is not None:
            total += _sums(engine, batch)
    if engine.mesh.world_size > 1:
        torch.distributed.all_reduce(total, group=engine.mesh.world_group)
    loss, tokens = total.tolist()
    return Evaluation(loss / tokens if tokens else float("nan"), round(tokens))


def _next(iterator: Any, engine: EvaluatedEngine, sharded: bool) -> Batch | None:
    """Return this rank's shard of its next batch, padding if it has run out, or None once all ranks have."""
    batch, problem, rows = None, None, 0
    try:
        batch = next(iterator, None)
        if batch is not None:
            rows = row_checksum(batch, engine.mesh, sharded=sharded)
            batch = _prepared(batch, engine, sharded)
    except Exception as error:  # the other ranks wait in the exchange, so report it there
        problem = error
    numbers = [int(problem is not None), int(batch is not None), rows]
    everyone = exchange(numbers, engine.mesh, "engine.evaluate", engine.global_steps)
    if problem is not None:
        raise problem
    refused = [rank for rank, numbers in enumerate(everyone) if numbers[0]]
    if refused:
        raise EngineError(f"ranks {refused} rejected an evaluation batch; see those ranks' logs")
    _check_groups([(bool(present), checksum) for _, present, checksum in everyone], engine)
    if not any(numbers[1] for numbers in everyone):
        return None
    return _padding(engine) if batch is None else batch


def _check_groups(found: list[tuple[bool, int]], engine: EvaluatedEngine) -> None:
    """Raise on every rank unless the ranks of each sequence group have equal pairs (has a batch, its checksum)."""
    size = engine.mesh.sequence_size
    for first in range(0, len(found), size):
        group = found[first : first + size]
        if len(set(group)) > 1:
            what = "different rows in" if len({present for present, _ in group}) == 1 else "different numbers of"
            raise EngineError(
                f"ranks {list(range(first, first + size))} share one sequence but have {what} evaluation batches: "
                "every rank of a sequence group must pass the same ones"
            )


def _prepared(batch: Batch, engine: EvaluatedEngine, sharded: bool) -> Batch:
    if not sharded:
        batch = shard_rows(batch, engine.mesh, engine.layout, engine.position_rule)
    labels = batch.get("shift_labels", batch.get("labels"))
    if labels is None:
        raise EngineError(f"an evaluation batch needs labels; it has {sorted(map(str, batch))}")
    device = engine.mesh.device
    moved = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
    labels = labels.to(device)
    # Divided by 1, the model's loss is the sum over this rank's tokens.
    divisor = torch.ones((), device=device)
    moved.pop("row_ids", None)
    return {**moved, "labels": labels, "shift_labels": labels, "num_items_in_batch": divisor, "use_cache": False}


def _padding(engine: EvaluatedEngine) -> Batch:
    """Return the shortest row that the layout allows, one or two tokens per rank, with every label ignored."""
    multiple = engine.layout.multiple(engine.mesh.ring_size, engine.mesh.ulysses_size)
    ids = torch.zeros(1, multiple, dtype=torch.int64)
    return _prepared({"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}, engine, sharded=False)


def _sums(engine: EvaluatedEngine, batch: Batch) -> torch.Tensor:
    """Return [sum of losses, number of valid tokens] of this rank's shard, (2,) fp64."""
    output = engine(**batch)
    logits = getattr(output, "logits", None)
    loss = getattr(output, "loss", output)
    if logits is not None:  # also right for models that ignore num_items_in_batch
        loss = token_loss(logits, batch["shift_labels"])
    tokens = (batch["shift_labels"] != IGNORED).sum()
    total = loss.double().reshape(()).masked_fill(tokens == 0, 0.0)
    return torch.stack([total, tokens.double()])

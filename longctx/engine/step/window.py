"""One accumulation window: cut its rows over the sequence ranks, and weigh its tokens. **The** home of token weighting.

The loss a user means is the mean over all valid tokens of the global batch. DeepSpeed averages gradients over the data
replicas, so each rank's loss has to be

    local_sum · data_size / global_count

with the count taken over ring, ulysses, data **and** every micro-batch of the window: a count per micro-batch was
51 % wrong on uneven data. ``weigh`` computes the divisor, once per window, in one exchange between all ranks, and
passes it as ``num_items_in_batch``, by which transformers' losses divide a sum.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.engine.exchange import exchange
from longctx.engine.step.accumulation import mark
from longctx.engine.step.rows import IGNORED, PADDING, Batch, explicit_rows, fill_padding
from longctx.errors import EngineError
from longctx.layout import Layout, get_layout
from longctx.mesh import Mesh
from longctx.models.hook.positions import PLAIN, PositionRule, check_positions
from longctx.sameness import checksum
from longctx.sharding import cut

Window = list[Batch]
_PAD = {"shift_labels": IGNORED, "document_ids": PADDING}
_LABELS = frozenset(("label", "labels", "target", "targets"))  # words of keys that are padded with -100
_REFUSED, _FINE = 1, 0


def shard_window(
    window: Window | Batch,
    mesh: Mesh,
    layout: str | Layout = "zigzag",
    *,
    rule: PositionRule = PLAIN,
    step: int = 0,
    trained: bool = True,
    problem: Exception | None = None,
) -> Any:
    """Return this rank's part of every micro-batch of one optimizer step, ready for ``engine(**batch)``.

    Collective: every rank of the world calls it, with as many micro-batches; the ranks of one sequence group pass the
    same full rows.

    Args:
        window: the micro-batches of one optimizer step (a dict, if that is one); see ``rows.explicit_rows`` for what
            a batch may hold. Rows are not changed.
        rule: how the model counts positions where a batch has none.
        step: optimizer steps that this rank has made; the same on all.
        trained: False for a window that is only looked at (see ``accumulation.WindowMark``).
        problem: what this rank has found wrong already; it is raised here, and the other ranks hear of it.

    Returns:
        a list for a list, a dict for a dict. Each micro-batch has input_ids (B, T) or inputs_embeds (B, T, D),
        position_ids (B, T) int64, document_ids (B, T) int32, ``use_cache=False`` and, where labels were given,
        ``labels`` and ``shift_labels`` (B, T) int64 (both shifted: transformers returns no loss without ``labels``)
        and ``num_items_in_batch``. Other tensors with the rows' (B, S) are cut alike, the rest is passed on. Where the
        layout pads, integer tensors with a word ``label(s)`` or ``target(s)`` in their key get −100, others 0.

    Raises:
        EngineError: on every rank, when any rank's window is refused or the ranks do not fit together.
    """
    batches: Window = []
    checksum = 0
    try:
        for batch in _listed(window) if problem is None else ():
            rows = explicit_rows(_moved(batch, mesh.device), rule)
            checksum = row_checksum(rows, mesh, checksum)
            batches.append(_cut(rows, mesh, layout))
    except Exception as error:  # whatever it is, the other ranks must hear of it: they wait in the exchange
        problem = error
    _weigh(batches, mesh, checksum, problem, "engine.shard", step)
    mark(batches, trained=trained)
    return batches[0] if isinstance(window, dict) else batches


def weigh_window(
    window: Window | Batch,
    mesh: Mesh,
    *,
    rule: PositionRule = PLAIN,
    step: int = 0,
    trained: bool = True,
    problem: Exception | None = None,
) -> Any:
    """Return a window that is already cut (each rank read its own part) with ``num_items_in_batch`` added.

    Collective, like ``shard_window``. ``labels`` and ``shift_labels`` may each stand for the other: both are the local
    labels, shifted before they were cut. ``row_ids`` (B,) int64, where given, says which rows of the data these are:
    it must be equal on all ranks of a sequence group, and is taken out.

    Raises:
        EngineError: on every rank, when any rank's window is refused or the numbers of micro-batches differ.
    """
    batches: Window = []
    checksum = 0
    try:
        for given in _listed(window) if problem is None else ():
            batch = _moved(given, mesh.device)
            checksum = row_checksum(batch, mesh, checksum, sharded=True)
            batch.pop("row_ids", None)
            if "document_ids" not in batch or "position_ids" not in batch:
                raise EngineError(
                    f"a sharded batch needs position_ids and document_ids; it has {sorted(map(str, batch))}. Full rows "
                    "go through engine.shard"
                )
            check_positions(batch["position_ids"], batch["document_ids"], rule)
            for key in ("input_ids", "inputs_embeds"):
                if key in batch:
                    batch[key] = fill_padding(batch[key], batch["document_ids"])
            labels = batch.get("shift_labels", batch.get("labels"))
            if labels is not None:
                batch["labels"] = batch["shift_labels"] = labels
            batches.append({**batch, "use_cache": False})
    except Exception as error:  # whatever it is, the other ranks must hear of it: they wait in the exchange
        problem = error
    _weigh(batches, mesh, checksum, problem, "engine.weigh", step)
    mark(batches, trained=trained)
    return batches[0] if isinstance(window, dict) else batches


def cut_rows(batch: Batch, mesh: Mesh, layout: str | Layout = "zigzag", rule: PositionRule = PLAIN) -> Batch:
    """Return this rank's part of one batch of full rows, unweighted. No communication."""
    return _cut(explicit_rows(_moved(batch, mesh.device), rule), mesh, layout)


def tokens_to_divide_by(global_count: int, data_size: int) -> float:
    """Return what a rank divides the sum of its token losses by: global_count / data_size, and 1 if there is no token.

    The weighting of the module's docstring, in one line: ``local_sum / tokens_to_divide_by`` averaged over data
    replicas and summed over sequence ranks and micro-batches is the mean over all valid tokens.
    """
    return max(global_count, 1) / data_size


def _weigh(batches: Window, mesh: Mesh, checksum: int, problem: Exception | None, at: str, step: int) -> None:
    """Count the window's labels over all ranks and write the divisor into every micro-batch; agree on errors."""
    labelled = [batch["shift_labels"] for batch in batches if "shift_labels" in batch]
    if problem is None and labelled and len(labelled) != len(batches):
        problem = EngineError(
            f"{len(labelled)} of {len(batches)} micro-batches of a window have labels: give them to all or to none"
        )
    count = sum(int((labels != IGNORED).sum()) for labels in labelled)
    status = _FINE if problem is None else _REFUSED
    everyone = exchange([status, len(batches), count, checksum, int(bool(labelled))], mesh, at, step)
    if problem is not None:
        raise problem
    _agree(everyone, mesh)
    if labelled:
        divisor = tokens_to_divide_by(sum(rank[2] for rank in everyone), mesh.data_size)
        for batch in batches:
            batch["num_items_in_batch"] = torch.tensor(divisor, dtype=torch.float32, device=mesh.device)


def _agree(everyone: list[list[int]], mesh: Mesh) -> None:
    """Raise on all ranks alike unless the windows of all ranks fit together."""
    refused = [rank for rank, numbers in enumerate(everyone) if numbers[0] != _FINE]
    if refused:
        raise EngineError(f"ranks {refused} refused their part of this window; their own messages say why")
    if len({(numbers[1], numbers[4]) for numbers in everyone}) > 1:
        sizes = [numbers[1] for numbers in everyone]
        raise EngineError(
            f"the ranks passed windows of {sizes} micro-batches, with labels on ranks "
            f"{[rank for rank, numbers in enumerate(everyone) if numbers[4]]}: all ranks must take the same number of "
            "micro-batches to an optimizer step, with labels on all or on none"
        )
    for first in range(0, mesh.world_size, mesh.sequence_size):
        group = range(first, first + mesh.sequence_size)
        if len({everyone[rank][3] for rank in group}) > 1:
            raise EngineError(
                f"ranks {list(group)} share one sequence but passed different rows: every rank of a sequence group "
                "must pass the same full rows to engine.shard, or its part of the same rows to engine.weigh. Sample "
                "with DistributedSampler(dataset, num_replicas=mesh.data_size, rank=mesh.data_rank) and the same seed"
            )


def _cut(rows: Batch, mesh: Mesh, layout: str | Layout) -> Batch:
    """Shard every tensor that has the rows' (B, S); pass the rest on."""
    shape = rows["document_ids"].shape
    local: Batch = {}
    for key, value in rows.items():
        if isinstance(value, torch.Tensor) and value.shape[:2] == shape:
            if key in ("input_ids", "inputs_embeds"):
                value = _lengthened(value, mesh, layout)
            value = cut(value, mesh, 1, layout, _pad_value(key, value))
        local[key] = value
    if "shift_labels" in local:
        local["labels"] = local["shift_labels"]
    return {**local, "use_cache": False}


def _lengthened(x: torch.Tensor, mesh: Mesh, layout: str | Layout) -> torch.Tensor:
    """Return tokens or embeddings with the layout's padding: each row's first, for a row of zeros may have no norm."""
    missing = get_layout(layout).padded_length(x.shape[1], mesh.ring_size, mesh.ulysses_size) - x.shape[1]
    filler = x[:, :1].detach().expand(-1, missing, *x.shape[2:])
    return torch.cat([x, filler], 1) if missing else x


def _pad_value(key: str, value: torch.Tensor) -> int:
    """Return what the layout pads a tensor of rows with: no padding may count as a label or as a document."""
    counts = value.is_floating_point() or value.dtype == torch.bool
    labels = not counts and not _LABELS.isdisjoint(str(key).lower().split("_"))
    return _PAD.get(key, IGNORED if labels else 0)


def row_checksum(rows: Batch, mesh: Mesh, seed: int = 0, *, sharded: bool = False) -> int:
    """Return a number that must be equal on the ranks of a sequence group; 0 where a rank has its sequence alone.

    Args:
        rows: full rows, or, with ``sharded``, this rank's part of them: those are different on every rank, so that only
            their shape and ``row_ids`` (B,) count.
        seed: the checksum of the micro-batches before.
    """
    if mesh.sequence_size == 1:
        return 0
    if not sharded:
        return _checksum(rows, seed)
    documents = rows.get("document_ids")
    shape = documents.shape if isinstance(documents, torch.Tensor) else ()
    return _checksum({"row_ids": rows.get("row_ids")}, seed * 31 + sum((i + 2) * n for i, n in enumerate(shape)))


def _checksum(rows: Batch, seed: int) -> int:
    """Return a number that differs, almost surely, when keys, shapes or any element of the rows differ."""
    total = seed
    for key in sorted(rows):
        value = rows[key]
        if isinstance(value, torch.Tensor):
            total = (total * 31 + int(checksum(value)) + sum(key.encode())) % (2**62)
    return total


def _listed(window: Window | Batch) -> Window:
    if isinstance(window, dict):
        return [window]
    if not isinstance(window, (list, tuple)) or not window or not all(isinstance(b, dict) for b in window):
        raise EngineError(
            f"a window is a dict (one micro-batch) or a non-empty list of dicts, not {type(window).__name__}"
            f"{' of length 0' if isinstance(window, (list, tuple)) and not window else ''}"
        )
    return list(window)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }

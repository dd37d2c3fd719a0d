"""Shard one accumulation window over the sequence ranks, and compute its loss normaliser.

The objective is the mean loss over all valid tokens of the global batch. DeepSpeed averages gradients over the data
replicas, so each rank's loss must be

    local_sum · data_size / global_count

where the count is over ring, ulysses, data **and** all micro-batches of the window (normalising per micro-batch was
51 % off on uneven data). The divisor global_count / data_size is computed once per window, in one exchange between all
ranks, and passed as ``num_items_in_batch``, by which transformers' losses divide their sum. Trainers that average over
another number of ranks (``average``) get the divisor that fits.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from longctx.engine.exchange import exchange
from longctx.engine.step.accumulation import mark_batches
from longctx.engine.step.rows import IGNORED, PADDING, Batch, explicit_rows, fill_padding
from longctx.errors import EngineError
from longctx.layout import Layout, get_layout
from longctx.mesh import Mesh
from longctx.models.hook.positions import PLAIN, PositionRule, check_positions
from longctx.sameness import checksum
from longctx.sharding import cut

Window = list[Batch]
Average = Literal["data", "world", "none"]
_PAD = {"shift_labels": IGNORED, "document_ids": PADDING}
_LABELS = frozenset(("label", "labels", "target", "targets"))  # words in keys whose tensors are padded with −100
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
    average: Average = "data",
    at: str = "engine.shard",
) -> Any:
    """Return this rank's shard of every micro-batch of one optimizer step, ready for ``engine(**batch)``.

    Collective over the world. All ranks pass the same number of micro-batches, and the ranks of one sequence group the
    same full rows.

    Args:
        window: the micro-batches of one optimizer step (a dict, if that is one); see ``rows.explicit_rows`` for their
            keys. Rows are not modified.
        rule: how the model counts positions if a batch has none.
        step: optimizer steps taken so far, the same on all ranks.
        trained: False for a window that is not trained (see ``accumulation.WindowMark``).
        problem: an error that this rank found before; it is raised here, so that the other ranks raise too.
        average: over which ranks the trainer averages gradients: "world" (all; DDP, FSDP, DeepSpeed without mpu),
            "data" (replicas; a longctx engine), or "none" (it sums over all ranks).
        at: the public call, for errors; one of ``exchange.CALL_SITES``.

    Returns:
        a list for a list, a dict for a dict. Each micro-batch has input_ids (B, T) or inputs_embeds (B, T, D),
        position_ids (B, T) int64, document_ids (B, T) int32, ``use_cache=False`` and, where labels were given,
        ``labels`` and ``shift_labels`` (B, T) int64 (both shifted: transformers returns no loss without ``labels``)
        and ``num_items_in_batch``. Other tensors that begin with (B, S) are sharded too, the rest is passed through.
        Layout padding is −100 in integer tensors with a word ``label(s)`` or ``target(s)`` in their key, else 0.

    Raises:
        EngineError: on every rank, if any rank's window is rejected or the windows of the ranks do not match.
    """
    batches: Window = []
    row_hash = 0
    try:
        for batch in _listed(window) if problem is None else ():
            row_hash, shard = shard_compared(batch, mesh, layout, rule, row_hash)
            batches.append(shard)
    except Exception as error:  # the other ranks wait in the exchange, so report it there
        problem = error
    weigh(batches, mesh, row_hash, problem, at, step, averaged_over(mesh, average))
    mark_batches(batches, trained=trained)
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
    """Return a window that is already sharded (each rank read its own shard) with ``num_items_in_batch`` added.

    Collective, like ``shard_window``. Either of ``labels`` and ``shift_labels`` is enough: both are the local labels,
    shifted before sharding. ``row_ids`` (B,) int64, if given, are the indices of the rows in the data; they must be
    equal on all ranks of a sequence group, and are removed.

    Raises:
        EngineError: on every rank, if any rank's window is rejected or the numbers of micro-batches differ.
    """
    batches: Window = []
    row_hash = 0
    try:
        for given in _listed(window) if problem is None else ():
            batch = _moved(given, mesh.device)
            row_hash = row_checksum(batch, mesh, row_hash, sharded=True)
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
    except Exception as error:  # the other ranks wait in the exchange, so report it there
        problem = error
    weigh(batches, mesh, row_hash, problem, "engine.weigh", step, mesh.data_size)
    mark_batches(batches, trained=trained)
    return batches[0] if isinstance(window, dict) else batches


def shard_rows(batch: Batch, mesh: Mesh, layout: str | Layout = "zigzag", rule: PositionRule = PLAIN) -> Batch:
    """Return this rank's shard of one batch of full rows, as ``shard_window`` does but without ``num_items_in_batch``.

    No communication: the rows of the ranks are not compared, and the caller counts the labels.
    """
    return _shard(explicit_rows(_moved(batch, mesh.device), rule), mesh, layout)


def shard_compared(
    batch: Batch, mesh: Mesh, layout: str | Layout, rule: PositionRule, row_hash: int
) -> tuple[int, Batch]:
    """Return the checksum of the rows so far, this batch included (``row_checksum``), and this rank's shard of it."""
    rows = explicit_rows(_moved(batch, mesh.device), rule)
    return row_checksum(rows, mesh, row_hash), _shard(rows, mesh, layout)


def averaged_over(mesh: Mesh, average: Average) -> int:
    """Return the number of ranks by which a trainer divides the sum of gradients.

    Raises:
        EngineError: ``average`` is none of "data", "world" and "none".
    """
    if average not in get_args(Average):
        raise EngineError(
            f"average={average!r}: write 'world' if the trainer averages gradients over all ranks (DDP, FSDP, "
            "DeepSpeed without an mpu), 'data' if over data replicas (a longctx engine), 'none' if it sums them"
        )
    return {"data": mesh.data_size, "world": mesh.world_size, "none": 1}[average]


def tokens_to_divide_by(global_count: int, averaged: int) -> float:
    """Return the divisor of a rank's sum of token losses: global_count / averaged, with a count of at least 1.

    ``local_sum / divisor``, summed over all ranks and micro-batches and divided by ``averaged`` (``averaged_over``), is
    the mean over all valid tokens.
    """
    return max(global_count, 1) / averaged


def weigh(
    batches: Window, mesh: Mesh, row_hash: int, problem: Exception | None, at: str, step: int, averaged: int
) -> int:
    """Count valid labels over all ranks and add the divisor to every micro-batch; return the count.

    Collective over the world. If one rank has a problem, all raise.
    """
    labelled = [batch["shift_labels"] for batch in batches if "shift_labels" in batch]
    if problem is None and labelled and len(labelled) != len(batches):
        problem = EngineError(
            f"{len(labelled)} of {len(batches)} micro-batches of a window have labels: give them to all or to none"
        )
    # One exchange carries status, window size, label count and row checksum: nothing is computed on bad input.
    count = sum(int((labels != IGNORED).sum()) for labels in labelled)
    status = _FINE if problem is None else _REFUSED
    everyone = exchange([status, len(batches), count, row_hash, int(bool(labelled))], mesh, at, step)
    if problem is not None:
        raise problem
    _agree(everyone, mesh)
    count = sum(rank[2] for rank in everyone)
    for batch in labelled and batches:
        divisor = tokens_to_divide_by(count, averaged)
        batch["num_items_in_batch"] = torch.tensor(divisor, dtype=torch.float32, device=mesh.device)
    return count


def _agree(everyone: list[list[int]], mesh: Mesh) -> None:
    """Raise on every rank unless the windows of all ranks match."""
    refused = [rank for rank, numbers in enumerate(everyone) if numbers[0] != _FINE]
    if refused:
        raise EngineError(f"ranks {refused} rejected their micro-batches; see those ranks' logs")
    if len({(numbers[1], numbers[4]) for numbers in everyone}) > 1:
        sizes = [numbers[1] for numbers in everyone]
        raise EngineError(
            f"the ranks passed windows of {sizes} micro-batches, with labels on ranks "
            f"{[rank for rank, numbers in enumerate(everyone) if numbers[4]]}: all ranks must pass the same number of "
            "micro-batches per optimizer step, with labels on all or on none"
        )
    for first in range(0, mesh.world_size, mesh.sequence_size):
        group = range(first, first + mesh.sequence_size)
        if len({everyone[rank][3] for rank in group}) > 1:
            raise EngineError(
                f"ranks {list(group)} share one sequence but passed different rows: every rank of a sequence group "
                "must pass the same full rows to engine.shard, or its part of the same rows to engine.weigh. Sample "
                "with DistributedSampler(dataset, num_replicas=mesh.data_size, rank=mesh.data_rank) and the same seed"
            )


def _shard(rows: Batch, mesh: Mesh, layout: str | Layout) -> Batch:
    """Shard every tensor that begins with the rows' (B, S); return the rest unchanged."""
    shape = rows["document_ids"].shape
    local: Batch = {}
    for key, value in rows.items():
        if isinstance(value, torch.Tensor) and value.shape[:2] == shape:
            if key in ("input_ids", "inputs_embeds"):  # padded with a real token here, not with zeros in `cut`
                value = _lengthened(value, mesh, layout)
            value = cut(value, mesh, 1, layout, _pad_value(key, value))
        local[key] = value
    if "shift_labels" in local:
        local["labels"] = local["shift_labels"]
    return {**local, "use_cache": False}


def _lengthened(x: torch.Tensor, mesh: Mesh, layout: str | Layout) -> torch.Tensor:
    """Return tokens or embeddings padded to the layout's length with each row's first token (see ``fill_padding``)."""
    missing = get_layout(layout).padded_length(x.shape[1], mesh.ring_size, mesh.ulysses_size) - x.shape[1]
    filler = x[:, :1].detach().expand(-1, missing, *x.shape[2:])
    return torch.cat([x, filler], 1) if missing else x


def _pad_value(key: str, value: torch.Tensor) -> int:
    """Return the padding value of a tensor of rows: padding must not count as a label or as a document."""
    counts = value.is_floating_point() or value.dtype == torch.bool
    labels = not counts and not _LABELS.isdisjoint(str(key).lower().split("_"))
    return _PAD.get(key, IGNORED if labels else 0)


def row_checksum(rows: Batch, mesh: Mesh, seed: int = 0, *, sharded: bool = False) -> int:
    """Return a checksum that must be equal on the ranks of a sequence group; 0 if sequences are not sharded.

    Args:
        rows: full rows; or, with ``sharded``, this rank's shard of them, of which only the shape and ``row_ids`` (B,)
            enter the checksum because the rest differs between ranks.
        seed: checksum of the previous micro-batches.
    """
    if mesh.sequence_size == 1:
        return 0
    if not sharded:
        return _checksum(rows, seed)
    documents = rows.get("document_ids")
    shape = documents.shape if isinstance(documents, torch.Tensor) else ()
    return _checksum({"row_ids": rows.get("row_ids")}, seed * 31 + sum((i + 2) * n for i, n in enumerate(shape)))


def _checksum(rows: Batch, seed: int) -> int:
    """Return a checksum of keys, shapes and elements of the rows."""
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

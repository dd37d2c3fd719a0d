"""Verify in forward that the ranks of a sequence group passed the same rows to ``longctx.shard``.

If they did not, the model trains on rows put together from parts of different sentences, with a loss that looks normal.
``engine.shard`` compares the rows of every window itself. A loop without it (``attach`` with another trainer's loader)
calls ``longctx.shard``, which does not communicate. The forward pass of a sharded model is collective over the sequence
group anyway, so the comparison is made there, over all rows since the start.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from longctx.engine.step.accumulation import find_mark
from longctx.errors import EngineError
from longctx.mesh import Mesh
from longctx.models.hook.binding import Binding, binding_of

_FIRST, _EVERY = 3, 16  # compare in the first 3 forward passes and every 16th: the checksum is over all rows so far


def watch_rows(model: Any, mesh: Mesh) -> None:
    """Register a hook on an attached model that runs ``compare_cut`` in training forward passes."""
    binding = binding_of(model)
    if binding is None or not binding.sharded:
        return
    passes = 0

    @torch.compiler.disable
    def compare(module: torch.nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal passes
        if not torch.is_grad_enabled() or _busy(binding) or find_mark(keywords) is not None:
            return
        passes += 1
        if passes <= _FIRST or passes % _EVERY == 0:
            compare_cut(mesh)

    binding.handles.append(model.register_forward_pre_hook(compare, with_kwargs=True))


def compare_cut(mesh: Mesh) -> None:
    """Raise on all ranks of a sequence group unless they have sharded the same rows. Collective over the group.

    Ranks that have sharded different numbers of tensors are not compared: one may have looked at an extra batch.

    Raises:
        EngineError: with the ranks, and how to sample rows.
    """
    mine = torch.tensor([mesh.cut.count, int(mesh.cut.checksum)], dtype=torch.int64, device=mesh.device)
    parts = [torch.empty_like(mine) for _ in range(mesh.sequence_size)]
    dist.all_gather(parts, mine, group=mesh.sequence_group)
    found = torch.stack(parts).tolist()
    if len({count for count, _ in found}) == 1 and len({total for _, total in found}) > 1:
        raise EngineError(
            f"ranks {list(mesh.sequence_ranks)} share one sequence but gave longctx.shard different rows: every rank "
            "of a sequence group must shard the same full rows. A loader with different rows on each rank does not "
            "work: sample with DistributedSampler(dataset, num_replicas=mesh.data_size, rank=mesh.data_rank) and the "
            "same seed, and disable the wrapper that another trainer puts around the loader"
        )


def _busy(binding: Binding) -> bool:
    """Return whether the model is generating: its cache then holds rows of another shape."""
    return binding.cache is not None

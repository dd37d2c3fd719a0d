"""Compare rows that ``longctx.shard`` has cut in the model's forward passes: where the ranks of a ring hold different
rows, it trains on sentences that are half one and half another, with a loss that looks normal.

``engine.shard`` compares the rows of every window itself. A loop without it (``attach`` and another trainer's loader)
cuts each tensor by ``longctx.shard``, which does not communicate; but the forward pass of a sharded model does, on all
ranks of the sequence group, so it also compares what they have cut since the beginning.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from longctx.engine.step.accumulation import find_mark
from longctx.errors import EngineError
from longctx.mesh import Mesh
from longctx.models.hook.binding import Binding, binding_of

_FIRST, _EVERY = 3, 16  # compared in the first forward passes, then in every 16th: a checksum of all rows so far


def watch_rows(model: Any, mesh: Mesh) -> None:
    """Have an attached model compare, while it trains, whether the ranks of its sequence group cut the same rows."""
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
    """Raise on all ranks of a sequence group unless they have cut the same rows. Collective over the group.

    Ranks that have cut different numbers of tensors are not compared: one of them may look at more.

    Raises:
        EngineError: with the ranks, and how rows are to be sampled.
    """
    mine = torch.tensor([mesh.cut.count, int(mesh.cut.checksum)], dtype=torch.int64, device=mesh.device)
    parts = [torch.empty_like(mine) for _ in range(mesh.sequence_size)]
    dist.all_gather(parts, mine, group=mesh.sequence_group)
    found = torch.stack(parts).tolist()
    if len({count for count, _ in found}) == 1 and len({total for _, total in found}) > 1:
        raise EngineError(
            f"ranks {list(mesh.sequence_ranks)} share one sequence but gave longctx.shard different rows: every rank "
            "of a sequence group must cut the same full rows. A loader that gives each rank rows of its own does not "
            "fit: sample with DistributedSampler(dataset, num_replicas=mesh.data_size, rank=mesh.data_rank) and the "
            "same seed, and switch off what another trainer puts around the loader"
        )


def _busy(binding: Binding) -> bool:
    """Tell whether the model generates, from a cache that has rows of its own."""
    return binding.cache is not None

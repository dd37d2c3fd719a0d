"""The loader of ``initialize(training_data=…)``: sharded, weighted windows from any map-style dataset of rows.

DeepSpeed's own loader does not support an mpu with sequence parallelism. The sample order is a function of (seed,
samples consumed) only, so it does not depend on the number of ranks, and resuming needs one integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import default_collate

from longctx.data.order import permute
from longctx.engine.step.rows import Batch
from longctx.errors import EngineError

if TYPE_CHECKING:
    from longctx.engine.engine import Engine


class RowLoader:
    """Iterate over windows, epoch after epoch; one ``for`` loop is (the rest of) one epoch.

    Args:
        dataset: map-style; items are dictionaries of (S,) tensors or lists, or whatever ``collate_fn`` takes.
        engine: whose batch sizes and ``shard`` are used.
        collate_fn: turns a list of items into a batch of full rows; the default stacks them.

    Raises:
        EngineError: the dataset is not map-style or is smaller than one global batch.
    """

    def __init__(
        self, dataset: Any, engine: Engine, *, collate_fn: Callable[[list[Any]], Batch] | None = None, seed: int = 0
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise EngineError(
                f"training_data is a {type(dataset).__name__}; a map-style dataset (with __len__ and __getitem__) is "
                "needed. For a stream, take your own loader and pass its windows to engine.shard"
            )
        self.dataset, self.engine, self.seed = dataset, engine, seed
        self.collate = collate_fn or _collate
        self.global_batch = engine.train_batch_size()
        self.consumed = 0  # samples, summed over replicas and epochs
        if len(dataset) < self.global_batch:
            raise EngineError(
                f"training_data has {len(dataset)} rows, fewer than one optimizer step takes (train_batch_size "
                f"{self.global_batch})"
            )

    def __len__(self) -> int:
        """Return the number of windows per epoch; leftover rows are dropped."""
        return len(self.dataset) // self.global_batch

    def __iter__(self) -> Iterator[list[Batch]]:
        micro = self.engine.train_micro_batch_size_per_gpu()
        steps, mesh = self.engine.gradient_accumulation_steps(), self.engine.mesh
        if self.engine.train_batch_size() != self.global_batch:
            raise EngineError(
                f"this loader counts epochs in batches of {self.global_batch} rows, and train_batch_size has been set "
                f"to {self.engine.train_batch_size()}: make another, longctx.engine.loader.RowLoader(dataset, engine)"
            )
        first = self.consumed // self.global_batch % len(self)
        for index in range(first, len(self)):
            order = self._order(self.consumed // self.global_batch // len(self))
            # Indexed (micro-batch, replica, row), so that a step has the same rows for any number of replicas.
            rows = order[index * self.global_batch : (index + 1) * self.global_batch].view(steps, mesh.data_size, micro)
            window = [self.collate([self.dataset[row] for row in part]) for part in rows[:, mesh.data_rank].tolist()]
            sharded = self.engine.shard(window)
            self.consumed += self.global_batch
            yield sharded

    def _order(self, epoch: int) -> torch.Tensor:
        rows = len(self.dataset)
        return torch.from_numpy(permute(np.arange(rows), rows, self.seed, epoch))

    def state_dict(self) -> dict[str, int]:
        """Return the seed and the number of samples consumed."""
        return {"seed": self.seed, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume after ``consumed`` samples."""
        self.seed, self.consumed = int(state["seed"]), int(state["consumed"])


def _collate(items: list[Any]) -> Batch:
    if not isinstance(items[0], dict):
        raise EngineError(f"training_data gave a {type(items[0]).__name__}; give dictionaries of rows, or a collate_fn")
    return default_collate([{key: torch.as_tensor(value) for key, value in item.items()} for item in items])

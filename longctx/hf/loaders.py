"""Loaders: the ranks of one sequence group read the same rows, different data replicas different ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from longctx.errors import EngineError
from longctx.hf.host import Host
from longctx.mesh import Mesh


class Loaders(Host):
    """Overrides of what Trainer makes its data loaders with."""

    mesh: Mesh

    def share_rows(self, accelerator: Any) -> None:
        """Make ``accelerator`` split a loader over data replicas instead of ranks, in place."""
        from accelerate.data_loader import prepare_data_loader

        mesh, settings = self.mesh, accelerator.dataloader_config

        def prepare(data_loader: Any, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None) -> Any:
            if getattr(data_loader, "_is_accelerate_prepared", False):
                return data_loader
            loader = prepare_data_loader(
                data_loader,
                accelerator.device,
                num_processes=mesh.data_size,
                process_index=mesh.data_rank,
                split_batches=accelerator.split_batches,
                put_on_device=accelerator.device_placement if device_placement is None else device_placement,
                rng_types=accelerator.rng_types.copy(),
                dispatch_batches=False,
                even_batches=accelerator.even_batches,
                use_seedable_sampler=accelerator.use_seedable_sampler,
                data_seed=settings.data_seed,
                non_blocking=accelerator.non_blocking,
                use_stateful_dataloader=accelerator.use_stateful_dataloader,
            )
            accelerator._dataloaders.append(loader)  # where prepare() registers what it has prepared
            return loader

        accelerator.prepare_data_loader = prepare
        accelerator.gather_for_metrics = accelerator.gather  # cuts off rows of ranks; here each replica has several

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As the trainer's own, with an order that depends on seed and epoch only, so that all ranks agree.

        Raises:
            EngineError: a sampler that distributes rows over ranks.
        """
        sampler = super()._get_train_sampler(train_dataset)
        if hasattr(sampler, "dp_size"):
            raise EngineError(
                f"train_sampling_strategy={self.args.train_sampling_strategy!r} distributes rows over all ranks, and "
                "the ranks of a ring need the same rows: use 'random', 'group_by_length' or 'sequential'"
            )
        seeded = isinstance(sampler, torch.utils.data.RandomSampler) and self.accelerator.use_seedable_sampler
        if getattr(sampler, "generator", 0) is None and not seeded:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return EpochSampler(sampler, seed)
        return sampler


class EpochSampler(torch.utils.data.Sampler[int]):
    """A sampler whose order is a function of (seed, epoch); others use torch's global generator.

    Args:
        sampler: has a ``generator``.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from self.sampler
        self.epoch += 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

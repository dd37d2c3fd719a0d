"""longctx.windows: sharded, weighted accumulation windows for any training loop, of DDP, FSDP or your own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import torch.distributed as dist

from longctx.engine.dropout import add_seeds
from longctx.engine.exchange import control_group
from longctx.engine.step.accumulation import mark_batches
from longctx.engine.step.rows import Batch
from longctx.engine.step.window import Average, Window, averaged_over, shard_compared, weigh
from longctx.errors import EngineError
from longctx.layout import Layout, get_layout
from longctx.mesh import Mesh
from longctx.models.hook.binding import Binding, binding_of
from longctx.models.hook.position_probe import position_rule
from longctx.models.hook.positions import PLAIN


class Windows:
    """Iterate over ``loader`` in accumulation windows (the micro-batches of one optimizer step), sharded for this rank.

    ::

        model = longctx.attach(model, mesh)
        windows = longctx.windows(loader, mesh, accumulation=4)
        for window in windows:
            for batch in window:
                model(**batch).loss.backward()
            optimizer.step()

    With ``average`` set to what the trainer does, the gradient is that of the mean loss over all valid tokens of the
    window, on every rank. Every micro-batch is what ``engine.shard`` returns: see ``step.window.shard_window`` for its
    keys. Each iteration is one pass over ``loader``; the last window may be shorter than ``accumulation``.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        mesh: Mesh,
        accumulation: int = 1,
        *,
        layout: str | Layout | None = None,
        average: Average = "world",
        model: torch.nn.Module | None = None,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        """Check the arguments. Collective over the world.

        Args:
            loader: iterable of dictionaries of full rows (``input_ids`` (B, S), …), the same on all ranks of a sequence
                group: sample with ``DistributedSampler(data, num_replicas=mesh.data_size, rank=mesh.data_rank)``.
            accumulation: micro-batches per optimizer step.
            layout: how rows are sharded; default the layout of the attached model, else zigzag.
            average: over which ranks the trainer averages gradients: "world" (all; DDP, FSDP, DeepSpeed without mpu),
                "data" (replicas; a longctx engine), or "none" (it sums over all ranks).
            model: the attached model, if more than one is attached to ``mesh``. It decides how positions are counted in
                batches without any, and whether batches carry seeds of attention dropout.
            seed: of attention dropout.
            start: optimizer steps taken so far, for a run that is resumed.

        Raises:
            EngineError: an argument is wrong, or models are attached that count positions differently.
            ModelError: the model would be wrong on a sharded sequence.
        """
        if not isinstance(accumulation, int) or accumulation < 1:
            raise EngineError(f"accumulation={accumulation!r}: a positive number of micro-batches is needed")
        self.loader, self.mesh, self.accumulation = loader, mesh.connect(), accumulation
        self.seed, self.steps = seed, start
        self.tokens = 0
        """Valid tokens of the current accumulation window, over all ranks."""
        self._averaged = averaged_over(mesh, average)
        self._model, binding = _attached(model, mesh)
        self.layout = _layout(layout, binding)
        self._rule = PLAIN if binding is None or self._model is None else position_rule(self._model, binding)
        control_group(mesh)

    def __len__(self) -> int:
        """Return the number of accumulation windows of one pass, if the loader knows its length."""
        return -(-len(self.loader) // self.accumulation)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Window]:
        batches = iter(self.loader)
        while window := self._next(batches):
            yield window
            self.steps += 1

    def global_loss(self, loss: torch.Tensor | float) -> float:
        """Return the mean loss over all valid tokens of the accumulation window, on every rank. Collective.

        Args:
            loss: the sum of this rank's losses over its micro-batches (detached).
        """
        total = torch.as_tensor(loss, dtype=torch.float64, device=self.mesh.device).detach().reshape(()).clone()
        if self.mesh.world_size > 1:
            dist.all_reduce(total, group=self.mesh.world_group)
        return float(total) / self._averaged

    def _next(self, batches: Iterator[Batch]) -> Window:
        """Return the next accumulation window; empty once the loaders of all ranks have ended. Collective over the
        world."""
        shards: Window = []
        row_hash, problem = 0, None
        try:
            for batch in islice(batches, self.accumulation):
                row_hash, shard = shard_compared(batch, self.mesh, self.layout, self._rule, row_hash)
                shards.append(shard)
        except Exception as error:  # the other ranks wait in the exchange, so report it there
            problem = error
        self.tokens = weigh(shards, self.mesh, row_hash, problem, "longctx.windows", self.steps, self._averaged)
        mark_batches(shards)
        return [self._with_seeds(batch, index) for index, batch in enumerate(shards)]

    def _with_seeds(self, batch: Batch, index: int) -> Batch:
        if self._model is None:
            return batch
        return add_seeds(self._model, batch, self.mesh, self.seed, self.steps, index)


windows = Windows  # longctx.windows(…) reads as what it returns


def _attached(model: torch.nn.Module | None, mesh: Mesh) -> tuple[torch.nn.Module | None, Binding | None]:
    """Return the attached model whose batches are sharded, and its binding; None for a model of the user's own.

    Raises:
        EngineError: ``model`` is not attached to ``mesh``; or it is not given, and several attached models differ.
    """
    if model is not None:
        for part in model.modules():  # the model inside DDP, PEFT or another wrapper
            binding = binding_of(part)
            if binding is not None and binding.mesh is mesh:
                return part, binding
        raise EngineError(
            f"{type(model).__name__} is not attached to this mesh: call longctx.attach(model, mesh) first"
        )
    found = [(part, its) for part in mesh.attached_models() if (its := binding_of(part)) and its.mesh is mesh]
    kinds = {(its.layout, its.drops, position_rule(part, its)) for part, its in found}
    if len(kinds) > 1:
        raise EngineError(
            f"{len(found)} models are attached to this mesh, with different layouts, positions or dropout: name the "
            "one that these rows are for, longctx.windows(…, model=model)"
        )
    return found[0] if found else (None, None)


def _layout(layout: str | Layout | None, binding: Binding | None) -> Layout:
    """Return the layout that is asked for, which must be the attached model's.

    Raises:
        EngineError: they differ.
    """
    if binding is None:
        return get_layout("zigzag" if layout is None else layout)
    if layout is not None and get_layout(layout).name != binding.layout:
        raise EngineError(
            f"layout={get_layout(layout).name!r}, but the model was attached with {binding.layout!r}: leave "
            "layout out, or attach the model with it"
        )
    return get_layout(binding.layout)

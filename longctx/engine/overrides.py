"""Overrides of DeepSpeedEngine's methods: those that are collective are checked, those that an mpu breaks are fixed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from longctx.engine.exchange import exchange, reached
from longctx.engine.save import save_pretrained
from longctx.engine.zero import fp16
from longctx.engine.zero.hpz import drop_copies
from longctx.errors import EngineError
from longctx.mesh import Mesh

logger = logging.getLogger(__name__)


class EngineOverrides(DeepSpeedEngine):
    """Base of ``Engine``: DeepSpeed's methods that it overrides apart from training itself."""

    mesh: Mesh
    _in_training = False  # mode of the latest forward pass with gradients

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """As DeepSpeed's, but ranks that do not arrive are named, and an unexpected eval mode is logged."""
        self._watch_mode()
        with reached(f"engine.forward after {self.global_steps} steps", self.mesh):
            return super().forward(*inputs, **keywords)

    def backward(self, *arguments: Any, **keywords: Any) -> Any:
        """As DeepSpeed's, but ranks that do not arrive are named."""
        with reached(f"engine.backward after {self.global_steps} steps", self.mesh):
            return super().backward(*arguments, **keywords)

    def step(self, *arguments: Any, **keywords: Any) -> Any:
        """As DeepSpeed's, but ranks that do not arrive are named."""
        with reached(f"engine.step after {self.global_steps} steps", self.mesh):
            return super().step(*arguments, **keywords)

    def _watch_mode(self) -> None:
        """Warn if training continues in eval mode, which an evaluation or a generation in between may have left on."""
        if not torch.is_grad_enabled():
            return
        if self._in_training and not self.module.training and self.mesh.rank == 0:
            logger.warning(
                "the model was trained in training mode and is now in eval mode: dropout is off. Call engine.train() "
                "after your own evaluation or generation (engine.evaluate and longctx.generate restore the mode)"
            )
        self._in_training = self.module.training

    def save_checkpoint(self, *arguments: Any, **keywords: Any) -> Any:
        """As DeepSpeed's, but ranks that are elsewhere (``if rank == 0``, a loop that ended early) are named.

        Raises:
            EngineError: on every rank, unless all ranks save after the same number of steps.
        """
        exchange([], self.mesh, "engine.save_checkpoint", self.global_steps)
        return super().save_checkpoint(*arguments, **keywords)

    def save_16bit_model(self, *arguments: Any, **keywords: Any) -> Any:
        """As DeepSpeed's, but ranks that are elsewhere are named, as by ``save_checkpoint``."""
        exchange([], self.mesh, "engine.save_16bit_model", self.global_steps)
        return super().save_16bit_model(*arguments, **keywords)

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write the model, or its PEFT adapters, as a folder that plain transformers or PEFT loads; return it.

        Collective over the world. On every ZeRO stage rank 0 writes the weights of all ranks, in forward's dtype.

        Args:
            folder: on storage that rank 0 can write to.
            options: of the model's own ``save_pretrained``: ``max_shard_size``, or PEFT's ``selected_adapters``.

        Raises:
            EngineError: on every rank, if the model has no ``save_pretrained`` or rank 0 could not write.
        """
        return save_pretrained(self, folder, options)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Not supported: DeepSpeed divides gradients of ``engine.scale(loss).backward()`` by the micro-batches.

        Raises:
            EngineError: always.
        """
        raise EngineError(
            "engine.scale(loss).backward() divides the loss by the number of micro-batches, but it is already weighted "
            "over the whole accumulation window, and the reported loss would miss it: call engine.backward(loss)"
        )

    def load_checkpoint(self, *arguments: Any, **keywords: Any) -> Any:
        """As DeepSpeed's, but stale hpZ copies of the weights are dropped, fp16's loss scale keeps this run's settings,
        and ranks that are elsewhere are named."""
        exchange([], self.mesh, "engine.load_checkpoint", self.global_steps)
        scaler = fp16.scaler_settings(self)
        loaded = super().load_checkpoint(*arguments, **keywords)
        fp16.restore_settings(self, scaler)
        drop_copies(self.module)
        return loaded

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the rows per optimizer step, over all data replicas, by changing the number of micro-batches.

        Call it on all ranks, between two accumulation windows; the next has ``gradient_accumulation_steps()`` of them.

        Raises:
            EngineError: it is not a multiple of ``train_micro_batch_size_per_gpu`` · data replicas, or a window is not
                finished.
        """
        rows = self.train_micro_batch_size_per_gpu() * self.mesh.data_size
        _check_count("train_batch_size", train_batch_size)
        if train_batch_size % rows:
            raise EngineError(
                f"set_train_batch_size({train_batch_size}): a multiple of {rows} is needed "
                f"(train_micro_batch_size_per_gpu {self.train_micro_batch_size_per_gpu()} x data replicas "
                f"{self.mesh.data_size})"
            )
        self._change_batch(self.train_micro_batch_size_per_gpu(), train_batch_size // rows)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the rows per micro-batch and data replica; an accumulation window keeps its number of micro-batches.

        Raises:
            EngineError: it is not a positive integer, or a window is not finished.
        """
        _check_count("train_micro_batch_size_per_gpu", micro_batch_size)
        self._change_batch(micro_batch_size, self.gradient_accumulation_steps())

    def _log_monitors(self, values: dict[str, float]) -> None:
        """Write values to DeepSpeed's monitors, where it writes the learning rate."""
        if self.monitor.enabled and self.mesh.rank == 0:
            self.monitor.write_events([(f"Train/Samples/{k}", v, self.global_samples) for k, v in values.items()])

    def _change_batch(self, micro: int, steps: int) -> None:
        if self._window_is_open():
            raise EngineError(
                "the batch size cannot change in the middle of a window: finish it with engine.step() for its last "
                "micro-batch first"
            )
        self._config.train_micro_batch_size_per_gpu = micro
        self._config.gradient_accumulation_steps = steps
        self._config.train_batch_size = micro * steps * self.mesh.data_size
        if hasattr(self.optimizer, "gradient_accumulation_steps"):
            self.optimizer.gradient_accumulation_steps = steps
        self.micro_steps = self.global_steps * steps

    def _window_is_open(self) -> bool:
        return self.micro_steps % self.gradient_accumulation_steps() != 0


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise EngineError(f"{name}: {value!r}; a positive integer is needed")

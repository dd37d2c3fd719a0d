"""RingDPO: TRL's DPOTrainer on sharded rows.

A preference loss needs the log-probabilities of whole sequences. So hooks around the model and the reference model
shard the full rows that TRL passes in, and gather what comes out per token; everything in between, and everything after
it, is TRL's. All ranks of a sequence compute the same loss, and each adds the gradient of its own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from longctx.engine.attach import attach
from longctx.engine.step.rows import Batch
from longctx.engine.step.window import shard_rows
from longctx.errors import EngineError
from longctx.hf.evaluation import RowEvaluation
from longctx.hf.limits import check_dpo
from longctx.hf.trainer import RingTrainer
from longctx.models.hook.binding import binding_of
from longctx.sharding import unshard

_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


class RingDPO(RingTrainer):
    """Mixin in front of TRL's DPOTrainer."""

    trusted_loss = True
    token_mean = False

    def attach_models(self) -> None:
        """Attach model and reference model to the mesh, with hooks that shard rows and gather log-probabilities."""
        check_dpo(self)
        super().attach_models()
        self._tp_size = self.mesh.sequence_size  # by which TRL divides the tokens that it counts over all ranks
        RowHooks(self, self.attached)
        if self.ref_model is not None:
            RowHooks(self, attach(self.accelerator.unwrap_model(self.ref_model), self.mesh, self.layout))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return full rows, after comparing them between the ranks of each sequence. Collective over the world."""
        batches: list[Batch] = []

        def kept() -> Iterator[Batch]:
            for batch in islice(epoch_iterator, num_batches):
                batches.append(batch)
                yield batch

        _, counted, _ = self.shard_rows_of(kept())
        self.count_input(counted)
        return batches, None

    def prediction_step(
        self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As TRL's own: the hooks shard the rows."""
        return super(RowEvaluation, self).prediction_step(model, inputs, prediction_loss_only, ignore_keys)


class RowHooks:
    """Hooks around one model: full rows go in, outputs per token of full rows come out."""

    def __init__(self, trainer: Any, model: torch.nn.Module) -> None:
        self.trainer, self.mesh, self.layout = trainer, trainer.mesh, trainer.layout
        self.length = 0
        model.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True)
        model.register_forward_hook(self.after)

    def before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: Batch) -> Any:
        """Shard the rows of a call."""
        binding: Any = binding_of(model)
        if binding.probe_records is not None:  # the probe that measures how the model counts positions
            return None
        if args or not kwargs.get("fused_lm_head"):
            raise EngineError(
                f"{type(model).__name__} was called for its logits, and only log-probabilities of whole rows are "
                "gathered: leave compute_metrics out, or set prediction_loss_only=True"
            )
        options = {key: value for key, value in kwargs.items() if not isinstance(value, torch.Tensor)}
        rows = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
        self.length = rows["input_ids"].shape[1]
        shard = shard_rows(rows, self.mesh, self.layout, self.trainer.rule)
        return args, {**options, **shard}

    def after(self, model: torch.nn.Module, args: Any, output: Any) -> Any:
        """Gather the outputs of a call; the label of a row's last token is no output of TRL's."""
        if getattr(binding_of(model), "probe_records", None) is not None:
            return None
        for name in _PER_TOKEN:
            value = getattr(output, name, None)
            if value is not None:
                if value.requires_grad:  # gradients are averaged over all ranks, and each adds those of its own tokens
                    value.register_hook(lambda gradient: gradient * self.mesh.sequence_size)
                output[name] = unshard(value, self.mesh, length=self.length, layout=self.layout)[:, :-1]
        output["loss"] = None
        return output

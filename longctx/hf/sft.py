"""RingSFT: TRL's SFTTrainer, packed and unpacked, on sharded rows."""

from __future__ import annotations

from typing import Any

from longctx.hf.limits import check_sft
from longctx.hf.trainer import RingTrainer


class RingSFT(RingTrainer):
    """Mixin in front of TRL's SFTTrainer, whose loss is a sum over this rank's ``shift_labels``."""

    trusted_loss = True
    _total_train_tokens: Any  # TRL's counter

    def attach_models(self) -> None:
        """Attach the trainer's model to the mesh, after the checks of TRL's settings."""
        check_sft(self)
        super().attach_models()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As TRL's own, with tokens counted over data replicas in the metric ``num_tokens``."""
        seen, training = self._total_train_tokens, self.model.training
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if training:  # TRL has counted shards; the trainer takes this micro-batch off the list after its step
            tokens = self.input_tokens if self.padding_free else self.valid_tokens
            self._total_train_tokens = seen + tokens[0]
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

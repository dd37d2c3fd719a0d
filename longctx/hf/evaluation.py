"""RowEvaluation: sharded forward passes, the mean loss over all valid tokens, and whole rows of logits for metrics."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from longctx.engine.step.rows import IGNORED, Batch
from longctx.errors import EngineError
from longctx.hf.host import Host
from longctx.layout import Layout
from longctx.mesh import Mesh
from longctx.sharding import unshard


class RowEvaluation(Host):
    """Overrides of Trainer's evaluation and prediction."""

    mesh: Mesh
    layout: Layout
    token_mean = True  # the loss of an evaluation is a mean over tokens
    _sum_of_losses, _tokens = 0.0, 0

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; the loss is the mean over all valid tokens of all rows, each row counted once."""
        self._sum_of_losses, self._tokens = 0.0, 0
        self.gather_function = self.gather_rows
        result = super().evaluation_loop(dataloader, description, *args, **kwargs)
        key = next((key for key in result.metrics if key.endswith("_loss")), None)
        if self.token_mean and self._tokens and key is not None:
            result.metrics[key] = self._sum_of_losses / self._tokens
        return result

    def prediction_step(
        self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Return the token mean of all replicas' rows, and this replica's whole logits and labels. Collective."""
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs.get("labels")
        if labels is not None:
            inputs["labels"] = self._without_repeats(labels)
        (batch,), _, count = self.shard_rows_of([inputs])
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels is None:
                loss, outputs = None, model(**batch)
            else:
                items = torch.tensor(float(max(count, 1)), device=self.mesh.device)
                found = self.compute_loss(model, batch, not prediction_loss_only, items)
                share, outputs = (found, None) if prediction_loss_only else found
                loss = self._mean(share.detach().mean(), count)
        if prediction_loss_only:
            return loss, None, None
        ignored = getattr(self.model.config, "keys_to_ignore_at_inference", []) if ignore_keys is None else ignore_keys
        length = next(inputs[key].shape[1] for key in ("input_ids", "inputs_embeds") if key in inputs)
        return loss, self._whole(outputs, batch, length, {*ignored, "past_key_values", "loss"}), labels

    def _mean(self, share: torch.Tensor, count: int) -> torch.Tensor:
        """Return the sum of all ranks' shares, and add it to the evaluation's sums."""
        total = share.double() / self.loss_factor
        if self.mesh.world_size > 1:
            dist.all_reduce(total, group=self.mesh.world_group)
        self._sum_of_losses += float(total) * count
        self._tokens += count
        return total.float()

    def _whole(self, outputs: Any, batch: Batch, length: int, ignored: set[str]) -> Any:
        """Return the outputs per token, gathered over the sequence group: (B, S, …) each.

        Raises:
            EngineError: an output that is not per token.
        """
        shape, found = batch["document_ids"].shape, []
        for name, value in outputs.items():
            if name in ignored or value is None:
                continue
            if not isinstance(value, torch.Tensor) or value.shape[:2] != shape:
                raise EngineError(
                    f"the model's output {name!r} is not per token and cannot be put together from shards: set "
                    "prediction_loss_only=True, or name it in ignore_keys"
                )
            found.append(unshard(value.detach(), self.mesh, length=length, layout=self.layout))
        return found[0] if len(found) == 1 else tuple(found)

    def _without_repeats(self, labels: torch.Tensor) -> torch.Tensor:
        """Return labels with −100 in rows that only fill up the last batch."""
        true = self._rows_left(labels.shape[0])
        return labels if true is None else labels.masked_fill((~true)[:, None].to(labels.device), IGNORED)

    def _rows_left(self, rows: int) -> torch.Tensor | None:
        """Return which rows of this replica's batch are rows of the data; None if all are.

        Accelerate fills up the last batch of all replicas with rows from the beginning.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return None
        return torch.arange(rows) + self.mesh.data_rank * rows < state.remainder

    def gather_rows(self, data: Any) -> Any:
        """Return the rows of all replicas, without those that only fill up the last batch. Collective."""
        if isinstance(data, (tuple, list)):
            return type(data)(self.gather_rows(part) for part in data)
        whole = data.contiguous()
        if self.mesh.data_size > 1:
            parts = [torch.empty_like(whole) for _ in range(self.mesh.data_size)]
            dist.all_gather(parts, whole, group=self.mesh.data_group)
            whole = torch.cat(parts)
        state = self.accelerator.gradient_state
        return whole[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else whole

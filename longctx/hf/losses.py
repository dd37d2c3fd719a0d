"""Losses: each rank's loss is its sum over local tokens, divided by the labels of the whole window.

A batch's labels are shifted before sharding, so a function that shifts them itself gets the logits and labels of one
more token (``Unshifted``); a model that ignores ``num_items_in_batch`` gets its loss computed from its logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from longctx.engine.exchange import exchange
from longctx.engine.step.loss import check_model_loss, token_loss
from longctx.engine.step.rows import IGNORED, Batch
from longctx.errors import EngineError
from longctx.hf.host import Host
from longctx.mesh import Mesh

logger = logging.getLogger(__name__)
LOSS_CHECK = "the check of the model's loss"


class Losses(Host):
    """Overrides of how Trainer computes its loss."""

    mesh: Mesh
    label_smoother: Any
    compute_loss_func: Any
    loss_is_scaled_for_ga: Any
    trusted_loss = False  # the trainer computes the loss of shards itself: no check of the model's
    _checked = False
    _from_logits = False

    def replace_losses(self) -> None:
        """Make label smoothing and ``compute_loss_func`` right for labels that are shifted already."""
        if self.label_smoother is not None:
            self.label_smoother = Aligned(self.label_smoother)
        if self.compute_loss_func is not None:
            self.compute_loss_func = Unshifted(self.compute_loss_func, self.mesh, self.shifts_labels)
        self._from_logits = not (self.model_accepts_loss_kwargs or self.trusted_loss) and self.compute_loss_func is None
        if self._from_logits:
            self.loss_is_scaled_for_ga = True

    @property
    def loss_factor(self) -> int:
        """By what the loss of a rank is multiplied, because gradients are averaged over all ranks."""
        return self.mesh.world_size if self.args.average_tokens_across_devices else 1

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this rank's loss, and the outputs with ``return_outputs``.

        The loss of the first window is compared with one computed from the logits; if the model has ignored
        ``num_items_in_batch``, the latter is used for the whole run.
        """
        if self._from_logits and "shift_labels" in inputs:
            return self._loss_from_logits(model, inputs, return_outputs, num_items_in_batch)
        own = self.trusted_loss or self.label_smoother is not None or self.compute_loss_func is not None
        if self._checked or own or num_items_in_batch is None or not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Trainer multiplies outputs.loss in place, so it is compared with a share that is multiplied too.
        labelled = {**inputs, "num_items_in_batch": num_items_in_batch / self.loss_factor}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        try:
            self._checked = check_model_loss(outputs, labelled, self.mesh, type(self.model).__name__)
        except EngineError as problem:
            if self.mesh.rank == 0:
                logger.warning("the loss is computed from the logits: %s", problem)
            self._from_logits = self.loss_is_scaled_for_ga = True
            loss = token_loss(outputs.logits, inputs["shift_labels"], num_items_in_batch) * self.loss_factor
        return (loss, outputs) if return_outputs else loss

    def _loss_from_logits(self, model: Any, inputs: Batch, return_outputs: bool, items: Any) -> Any:
        keywords = {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")}
        outputs, labels = model(**keywords), inputs["shift_labels"]
        if self.label_smoother is not None:
            loss = self.label_smoother(outputs, labels, num_items_in_batch=items)
        else:
            loss = token_loss(outputs.logits, labels, items)
        loss = loss * self.loss_factor
        return (loss, outputs) if return_outputs else loss


class Aligned:
    """A label smoother for labels that are aligned with the logits, whatever ``shift_labels`` says."""

    def __init__(self, smoother: Callable[..., torch.Tensor]) -> None:
        self.smoother = smoother

    def __call__(self, outputs: Any, labels: Any, shift_labels: bool = False, num_items_in_batch: Any = None) -> Any:
        return self.smoother(outputs, labels, shift_labels=False, num_items_in_batch=num_items_in_batch)


class Unshifted:
    """A ``compute_loss_func`` as Trainer's users write it, which shifts labels itself, on a shard.

    With one more row of logits at the end and −100 in front of the shifted labels, ``logits[:, :-1]`` and
    ``labels[:, 1:]`` are again the shard's logits and targets. The first call verifies that the function divides by
    ``num_items_in_batch``: with twice the count it must return half.
    """

    def __init__(self, function: Callable[..., torch.Tensor], mesh: Mesh, shifts: bool) -> None:
        self.function, self.mesh, self.shifts, self.checked = function, mesh, shifts, False

    def __call__(self, outputs: Any, labels: torch.Tensor | None, num_items_in_batch: Any = None) -> torch.Tensor:
        if labels is not None and self.shifts:
            outputs, labels = self._longer(outputs, labels)
        loss = self.function(outputs, labels, num_items_in_batch=num_items_in_batch)
        if not self.checked and num_items_in_batch is not None and torch.is_grad_enabled():
            self._check(loss, outputs, labels, num_items_in_batch)
        return loss

    def _longer(self, outputs: Any, labels: torch.Tensor) -> tuple[Any, torch.Tensor]:
        logits = torch.nn.functional.pad(outputs["logits"], (0, 0, 0, 1))
        longer = type(outputs)(**{**outputs, "logits": logits})
        return longer, torch.nn.functional.pad(labels, (1, 0), value=IGNORED)

    @torch.no_grad()
    def _check(self, loss: torch.Tensor, outputs: Any, labels: Any, items: Any) -> None:
        half = self.function(outputs, labels, num_items_in_batch=items * 2)
        given = float(loss)
        wrong = not abs(float(half) * 2 - given) <= 1e-3 * abs(given) + 1e-9
        if any(rank[0] for rank in exchange([int(wrong)], self.mesh, LOSS_CHECK)):
            raise EngineError(
                "compute_loss_func does not divide a sum over tokens by num_items_in_batch (with twice the count it "
                "does not return half the loss): a mean over one rank's tokens is no part of the mean over all of them"
            )
        self.checked = True

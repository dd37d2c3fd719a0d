"""The loss of one shard: a sum over its tokens, divided as ``window`` says; and a check that a model's loss is that."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from longctx.engine.exchange import exchange
from longctx.engine.step.rows import IGNORED
from longctx.errors import EngineError
from longctx.mesh import Mesh
from longctx.models.hook.binding import binding_of
from longctx.models.hook.verify import named, refuse_added_loss

# Autograd nodes between a model's last cross entropy and the loss that it returns.
_ONE_INPUT = ("Div", "Mul", "ToCopy", "View", "Squeeze", "Clone", "Alias", "Reshape")
DIVISOR = "num_items_in_batch"
_CHUNK = 1024  # tokens whose logits are copied to fp32 at a time


def token_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the sum of cross entropies of this rank's tokens, divided by ``num_items_in_batch`` if given.

    Zero (with zero gradient) where every label is ignored: never a shortcut around the logits, because every rank has
    to take part in the collectives of the backward pass.

    Args:
        logits: (B, T, V), any floating dtype; the sum is fp32.
        labels: (B, T) int64, shifted, −100 where ignored.
    """
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total if num_items_in_batch is None else total / num_items_in_batch


@torch.no_grad()
def token_loss_in_chunks(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the sum of cross entropies without a second full copy of the logits; no gradient."""
    flat, targets = logits.detach().flatten(0, -2), labels.flatten()
    pieces = zip(flat.split(_CHUNK), targets.split(_CHUNK), strict=True)
    return float(sum(F.cross_entropy(x.float(), y, ignore_index=IGNORED, reduction="sum").double() for x, y in pieces))


def check_model_loss(output: Any, batch: dict[str, Any], mesh: Mesh, name: str) -> bool:
    """Check that a model divided its loss by ``num_items_in_batch``, and return whether that could be told.

    Some model classes take the keyword and return their local mean all the same (BERT's heads, in transformers 5).
    Collective over the world, so that all ranks raise or none does.

    Raises:
        EngineError: on every rank, when the loss of any rank is not its share.
    """
    wrong, told, message = False, False, ""
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    labels, divisor = batch.get("shift_labels"), batch.get("num_items_in_batch")
    # Without labels (a loop that computes its own loss may leave them out) no model owes a loss.
    if loss is None and hasattr(output, "loss") and batch.get("labels") is not None:
        wrong, message = True, f"{name} returned no loss although it was given labels"
    elif loss is not None and logits is not None and labels is not None and divisor is not None:
        total, count = token_loss_in_chunks(logits, labels), int((labels != IGNORED).sum())
        share, mean, given = total / float(divisor), total / max(count, 1), float(loss.detach())
        slack = (2e-3 if logits.dtype == torch.float32 else 2e-2) * max(abs(share), 1e-6)
        told = abs(share - mean) > 4 * slack
        wrong = not abs(given - share) <= slack and given == given  # a NaN is the step's affair
        message = (
            f"{name} returned a loss of {given:.6g}, but this rank's share of the mean over all tokens is {share:.6g} "
            f"(its local mean is {mean:.6g}): the class does not divide by num_items_in_batch, or adds an auxiliary "
            "loss (set output_router_logits=False). Compute the loss from the logits instead: "
            "engine.token_mean(losses, batch['shift_labels']), with losses per token (reduction='none')"
        )
    everyone = exchange([int(wrong), int(told)], mesh, "the check of the model's loss")
    if any(rank[0] for rank in everyone):
        bad = [rank for rank, numbers in enumerate(everyone) if numbers[0]]
        raise EngineError(message if wrong else f"the model's loss is not its rank's share on ranks {bad}")
    return any(rank[1] for rank in everyone)


def refuse_additions(model: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], parts: int) -> None:
    """Refuse a call that asks the model for an auxiliary loss, before anything is computed.

    Args:
        parts: ranks times micro-batches of an optimizer step; a loss over all its tokens at once is the model's affair.

    Raises:
        ModelError: see ``models.verify.refuse_added_loss``.
    """
    binding = binding_of(model)
    if binding is not None and parts > 1 and DIVISOR in kwargs:
        refuse_added_loss(type(model).__name__, named(model, inputs, kwargs), binding.configs)


def check_nothing_added(output: Any, kwargs: dict[str, Any], parts: int, name: str) -> None:
    """Refuse a loss that is a sum of several: what a model adds to its cross entropy is not weighted over the window.

    Read off the end of the autograd graph, so it costs nothing and holds for every call, however small the addend.

    Raises:
        EngineError: the last operation on ``output.loss`` with more than one input is an addition.
    """
    loss = getattr(output, "loss", None) if parts > 1 and DIVISOR in kwargs else None
    node = getattr(loss, "grad_fn", None)
    while node is not None:
        if type(node).__name__.startswith(("Add", "Sub")):
            raise EngineError(
                f"{name} added something to its loss (a load-balancing or another auxiliary loss), which would be that "
                "of one rank's tokens in one micro-batch, not of the whole batch. Turn it off in the model's config, "
                "or compute the loss from the logits: engine.token_mean(losses, batch['shift_labels']), with losses "
                "per token (reduction='none')"
            )
        inputs = [following for following, _ in node.next_functions if following is not None]
        node = inputs[0] if len(inputs) == 1 and type(node).__name__.startswith(_ONE_INPUT) else None

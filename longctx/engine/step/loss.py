"""The loss of one shard, a sum over its tokens divided by the window's divisor; and checks of a model's own loss."""

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

# Autograd nodes with one input that may follow the cross entropy in a model's loss.
_ONE_INPUT = ("Div", "Mul", "ToCopy", "View", "Squeeze", "Clone", "Alias", "Reshape")
DIVISOR = "num_items_in_batch"
_CHUNK = 1024  # tokens per chunk of logits that is copied to fp32


def token_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the sum of cross entropies of this rank's tokens, divided by ``num_items_in_batch`` if given.

    If every label is ignored it is 0 with a zero gradient, still computed from the logits: every rank must take part in
    the collectives of backward.

    Args:
        logits: (B, T, V), any floating dtype; the sum is fp32.
        labels: (B, T) int64, shifted, −100 where ignored.
    """
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total if num_items_in_batch is None else total / num_items_in_batch


@torch.no_grad()
def token_loss_in_chunks(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the sum of cross entropies without a whole fp32 copy of the logits, and without gradient."""
    flat, targets = logits.detach().flatten(0, -2), labels.flatten()
    pieces = zip(flat.split(_CHUNK), targets.split(_CHUNK), strict=True)
    return float(sum(F.cross_entropy(x.float(), y, ignore_index=IGNORED, reduction="sum").double() for x, y in pieces))


def check_model_loss(output: Any, batch: dict[str, Any], mesh: Mesh, name: str) -> bool:
    """Check that a model divided its loss by ``num_items_in_batch``; return whether the check could tell.

    Some model classes accept the keyword but return their local mean (BERT's heads, in transformers 5). Collective over
    the world, so that all ranks raise or none does.

    Raises:
        EngineError: on every rank, if any rank's loss is not its share.
    """
    wrong, told, message = False, False, ""
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    labels, divisor = batch.get("shift_labels"), batch.get("num_items_in_batch")
    # A loop that computes its own loss may leave labels out; then the model returns none.
    if loss is None and hasattr(output, "loss") and batch.get("labels") is not None:
        wrong, message = True, f"{name} returned no loss although it was given labels"
    elif loss is not None and logits is not None and labels is not None and divisor is not None:
        total, count = token_loss_in_chunks(logits, labels), int((labels != IGNORED).sum())
        share, mean, given = total / float(divisor), total / max(count, 1), float(loss.detach())
        slack = (2e-3 if logits.dtype == torch.float32 else 2e-2) * max(abs(share), 1e-6)
        told = abs(share - mean) > 4 * slack
        wrong = not abs(given - share) <= slack and given == given  # the step reports a NaN
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
    """Raise if a call requests an auxiliary loss from the model, before anything is computed.

    Args:
        parts: ranks times micro-batches per optimizer step; with 1, an auxiliary loss is over the whole batch and fine.

    Raises:
        ModelError: see ``models.hook.verify.refuse_added_loss``.
    """
    binding = binding_of(model)
    if binding is not None and parts > 1 and DIVISOR in kwargs:
        refuse_added_loss(type(model).__name__, named(model, inputs, kwargs), binding.configs)


def check_nothing_added(output: Any, kwargs: dict[str, Any], parts: int, name: str) -> None:
    """Raise if a model added something to its cross entropy, which would not be normalised over the window.

    This inspects the end of the autograd graph, so it costs nothing and finds addends of any size.

    Raises:
        EngineError: the last operation on ``output.loss`` with more than one input is an addition.
    """
    loss = getattr(output, "loss", None) if parts > 1 and DIVISOR in kwargs else None
    node = getattr(loss, "grad_fn", None)
    while node is not None:
        if type(node).__name__.startswith(("Add", "Sub")):
            raise EngineError(
                f"{name} added something to its loss (a load-balancing or another auxiliary loss) computed over "
                "one rank's tokens of one micro-batch, not over the whole batch. Turn it off in the model's config, "
                "or compute the loss from the logits: engine.token_mean(losses, batch['shift_labels']), with losses "
                "per token (reduction='none')"
            )
        inputs = [following for following, _ in node.next_functions if following is not None]
        node = inputs[0] if len(inputs) == 1 and type(node).__name__.startswith(_ONE_INPUT) else None

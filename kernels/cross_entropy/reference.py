"""Cross entropy of a whole tensor of logits, and its gradient: the reference of the fused kernel."""

from __future__ import annotations

import torch


def loss_and_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's loss (n,) and its gradient with respect to the logits (n, V).

    With x = softcap tanh(logits / softcap), lse = log sum exp(x), p = exp(x - lse):
    loss = lse - x[label] + z_loss lse², d loss / dx = (1 + 2 z_loss lse) p - onehot(label). Both are 0 if the label is
    ``ignore_index``.

    Args:
        logits: (n, V) floating.
        labels: (n,) int64, in [0, V) or ``ignore_index``.
    """
    counts = labels != ignore_index
    labels = labels.where(counts, 0)
    x = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse = x.logsumexp(-1)
    loss = lse - x.gather(-1, labels[:, None])[:, 0] + z_loss * lse.square()
    onehot = torch.nn.functional.one_hot(labels, x.shape[-1])
    gradient = (1 + 2 * z_loss * lse)[:, None] * (x - lse[:, None]).exp() - onehot
    if softcap is not None:
        gradient = gradient * (1 - (x / softcap).square())
    return loss.where(counts, 0), gradient.where(counts[:, None], 0)

"""Compare one language model class, sharded over a ring, with the same weights, whole and eager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from models.every_class import VOCABULARY, small_model

from longctx.engine.loss import token_loss
from longctx.engine.window import shard_window
from longctx.errors import EngineError, ModelError
from longctx.models.attach import attach_attention

LENGTH, BORDERS = 37, (11, 12, 24)
KINDS = ("packed", "left", "right", "hole")
IGNORED = -100


def rows(kind: str, masked: bool) -> dict[str, torch.Tensor]:
    """Return two rows (2, S): input_ids, labels (shift_labels for a masked model) and documents or a mask."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    batch = {"input_ids": tokens}
    mask = torch.ones_like(tokens)
    if kind == "packed":
        ids = torch.zeros_like(tokens)
        for border in BORDERS:
            ids[0, border:] += 1
            ids[1, LENGTH - border :] += 1
        batch["document_ids"] = ids
    elif kind == "left":
        mask[0, :5], mask[1, :2] = 0, 0
    elif kind == "right":
        mask[0, -5:], mask[1, -9:] = 0, 0
    else:
        mask[0, 9:13], mask[1, 20:21] = 0, 0
    if kind != "packed":
        batch["attention_mask"] = mask
        tokens[mask == 0] = 1  # the pad token of the small configs
    labels = tokens.masked_fill(mask == 0, IGNORED)
    if masked:
        batch["shift_labels"] = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.5, IGNORED)
    else:
        batch["labels"] = labels
    return batch


@contextmanager
def finite_masks() -> Iterator[None]:
    """Have eager attention hide keys with fp32's lowest number: its softmax is fp32, where fp64's is -inf and NaN."""
    from transformers import masking_utils

    table, plain = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, masking_utils.eager_mask

    def finite(*arguments: Any, dtype: torch.dtype = torch.float32, **keywords: Any) -> Any:
        mask = plain(*arguments, dtype=torch.float32, **keywords)
        return None if mask is None else mask.to(dtype)

    table["eager"] = finite
    try:
        yield
    finally:
        table["eager"] = plain


def eager_loss(model: Any, batch: dict[str, torch.Tensor], masked: bool) -> torch.Tensor:
    """Return the mean loss over all valid tokens, every document run by itself: nothing else is given to the model."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    given = batch["shift_labels" if masked else "labels"]
    targets = given if masked else torch.nn.functional.pad(given[:, 1:], (0, 1), value=IGNORED)
    if "document_ids" not in batch:
        targets = targets.masked_fill(batch["attention_mask"] == 0, IGNORED)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **_quiet(model)).logits
        return token_loss(logits.double(), targets) / (targets != IGNORED).sum()
    for row, ids in enumerate(batch["document_ids"]):
        for document in ids.unique():
            inside = ids == document
            tokens, labels = batch["input_ids"][row, inside][None], targets[row, inside][None].clone()
            if not masked:
                labels[:, -1] = IGNORED
            logits = model(input_ids=tokens, **_quiet(model)).logits
            total = total + token_loss(logits.double(), labels)
            count += int((labels != IGNORED).sum())
    return total / count


def _quiet(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def is_masked(name: str) -> bool:
    return name.endswith("ForMaskedLM")


def errors(name: str, mesh: Any, kind: str) -> dict[str, float]:
    """Return the relative errors of loss and gradients of one class on one kind of rows."""
    masked = is_masked(name)
    batch = rows(kind, masked)
    eager = small_model(name).train()
    with finite_masks():
        truth = eager_loss(eager, batch, masked)
    truth.backward()
    model = small_model(name).train()
    attach_attention(model, mesh)
    part = shard_window(batch, mesh)
    labels, divisor = part.pop("shift_labels"), part.pop("num_items_in_batch")
    part.pop("labels")
    loss = token_loss(model(**part).logits.double(), labels, divisor)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=mesh.sequence_group)
    worst, where, largest = 0.0, "", 0.0
    theirs = dict(eager.named_parameters())
    largest = max((float(x.grad.abs().max()) for x in theirs.values() if x.grad is not None), default=0.0)
    for key, ours in model.named_parameters():
        gradient = torch.zeros_like(ours) if ours.grad is None else ours.grad.clone()
        dist.all_reduce(gradient, group=mesh.sequence_group)
        wanted = theirs[key].grad
        wanted = torch.zeros_like(gradient) if wanted is None else wanted
        error = float((gradient - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-3 * largest, 1e-30)
        if not error <= worst:
            worst, where = error, key
    return {"loss": abs(float(total - truth)) / abs(float(truth)), "gradient": worst, "where": where}  # type: ignore[dict-item]


def verdict(name: str, mesh: Any, kinds: tuple[str, ...] = KINDS) -> dict[str, str]:
    """Return, for each kind of rows, "right", "refused: …", "eager: …" (it cannot run whole), "wrong: …", "crash: …"."""
    result = {}
    for kind in kinds:
        try:
            model = small_model(name).eval()
            model(input_ids=rows(kind, False)["input_ids"], **_quiet(model))
        except Exception as problem:
            result[kind] = f"eager: {type(problem).__name__}: {str(problem)[:200]}"
            continue
        try:
            found = errors(name, mesh, kind)
            good = found["loss"] <= 1e-5 and found["gradient"] <= 1e-5
            result[kind] = "right" if good else f"wrong: {found}"
        except (ModelError, EngineError) as problem:
            result[kind] = f"refused: {problem}"
        except Exception as problem:
            result[kind] = f"crash: {type(problem).__name__}: {str(problem)[:300]}"
    return result

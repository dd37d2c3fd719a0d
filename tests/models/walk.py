"""Compare one language model class, sharded over a ring, with the same weights, whole and eager."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from models.every_class import VOCABULARY, small_model

from longctx.engine.step.loss import token_loss
from longctx.engine.step.window import shard_window
from longctx.errors import EngineError, ModelError
from longctx.models.attach import attach_attention
from longctx.models.hook.binding import binding_of
from longctx.models.hook.position_probe import position_rule

from tolerances import tolerance

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
        ids[1, 11:] = 1
        ids[1, 15:], ids[1, 30:] = 0, 2  # document 0's number comes back, for another document
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
        numbers = ids.unique_consecutive(return_inverse=True)[1]
        for inside in (numbers == number for number in numbers.unique()):
            tokens, labels = batch["input_ids"][row, inside][None], targets[row, inside][None].clone()
            if not masked:
                labels[:, -1] = IGNORED
            logits = model(input_ids=tokens, **_quiet(model)).logits
            total = total + token_loss(logits.double(), labels)
            count += int((labels != IGNORED).sum())
    return total / count


def _quiet(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


class Pair:
    """A class's small model twice, with the same weights: eager and whole, and attached to a mesh."""

    def __init__(self, name: str, mesh: Any) -> None:
        self.masked, self.mesh = name.endswith("ForMaskedLM"), mesh
        self.eager = small_model(name)
        self.model = copy.deepcopy(self.eager)
        with torch.no_grad():
            self.eager.eval()(input_ids=torch.full((1, 8), 5), **_quiet(self.eager))

    def errors(self, kind: str) -> tuple[float, float, str]:
        """Return the relative errors of the loss and of the worst gradient, and whose it is, on one kind of rows."""
        batch = rows(kind, self.masked)
        self.eager.train().zero_grad()
        self.model.train().zero_grad()
        with finite_masks():
            truth = eager_loss(self.eager, batch, self.masked)
        truth.backward()
        binding = binding_of(self.model)
        assert binding is not None
        part = shard_window(batch, self.mesh, rule=position_rule(self.model, binding))
        labels, divisor = part.pop("shift_labels"), part.pop("num_items_in_batch")
        part.pop("labels")
        loss = token_loss(self.model(**part).logits.double(), labels, divisor)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total, group=self.mesh.sequence_group)
        return (float(abs(total - truth.detach()) / abs(truth.detach())), *self._gradients())

    def _gradients(self) -> tuple[float, str]:
        theirs = {key: x.grad for key, x in self.eager.named_parameters() if x.grad is not None}
        largest = max(float(gradient.abs().max()) for gradient in theirs.values())
        worst, where = 0.0, ""
        for key, ours in self.model.named_parameters():
            gradient = torch.zeros_like(ours) if ours.grad is None else ours.grad.clone()
            dist.all_reduce(gradient, group=self.mesh.sequence_group)
            wanted = theirs.get(key, torch.zeros_like(gradient))
            error = float((gradient - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-2 * largest)
            error = math.inf if math.isnan(error) else error
            if error > worst:
                worst, where = error, key
        return worst, where


def _refusal(model: Any, mesh: Any) -> str | None:
    """Attach the model, and return why it is refused, before any row is seen."""
    try:
        attach_attention(model, mesh)
        binding = binding_of(model)
        assert binding is not None
        position_rule(model, binding)
    except (ModelError, EngineError) as problem:
        return f"refused: {problem}"
    return None


def _not_compared(name: str, mesh: Any, problem: Exception) -> str:
    """Return why a class that does not run small, whole and in fp64 is refused; if it is not, why it does not run."""
    try:
        refusal = _refusal(small_model(name).float(), mesh)
    except Exception:
        refusal = None
    return refusal or f"not run: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


def verdict(name: str, mesh: Any, kinds: tuple[str, ...] = KINDS) -> dict[str, str]:
    """Return for each kind of rows "right", or "refused", "not run", "wrong" or "crash", and why.

    What is said of a class and not of its rows stands under "all": it is refused, cannot be built small here, or does
    not run on tokens alone, eager and whole.
    """
    try:
        pair = Pair(name, mesh)
    except Exception as problem:
        return {"all": _not_compared(name, mesh, problem)}
    refusal = _refusal(pair.model, mesh)
    if refusal is not None:
        return {"all": refusal}
    result = {}
    for kind in kinds:
        try:
            loss, gradient, where = pair.errors(kind)
            good = loss <= tolerance("model") and gradient <= tolerance("any model")
            result[kind] = "right" if good else f"wrong: loss {loss:.1e}, gradient of {where} {gradient:.1e}"
        except (ModelError, EngineError) as problem:
            result[kind] = f"refused: {problem}"
        except Exception as problem:
            result[kind] = f"crash: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    return result

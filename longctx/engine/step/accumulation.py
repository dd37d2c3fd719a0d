"""Which micro-batch of which window is being trained, and does the optimizer step come after it?

DeepSpeed counts calls of ``step()``, and takes every ``gradient_accumulation_steps``-th for the end of a window. That
count is wrong for the short last window of an epoch and for loops that call ``step()`` once per window. Here the
tensors that ``engine.shard`` and ``engine.weigh`` return carry their window's size and their own number, so the engine
sees what is trained, however the loop is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from longctx.errors import EngineError

_MARK = "longctx_micro_batch"
_MARKED = ("num_items_in_batch", "document_ids", "position_ids", "input_ids")


@dataclass(eq=False)
class WindowMark:
    """One window: how many micro-batches it has, and whether it may be trained."""

    size: int
    trained: bool = True  # False: cut under torch.no_grad(), where any number of micro-batches is taken


@dataclass(eq=False)
class MicroBatchMark:
    """Number ``index`` of its window, with what the check of its loss needs."""

    window: WindowMark
    index: int
    labels: torch.Tensor | None = None  # (B, T), shifted
    divisor: torch.Tensor | None = None  # ()


def size_problem(window: Any, wanted: int, last: bool) -> EngineError | None:
    """Return what is wrong with the number of micro-batches of a window that is to be trained, or None.

    Args:
        window: a list of micro-batches, or one as a dictionary.
        wanted: ``gradient_accumulation_steps``.
        last: it is the last of an epoch, and may be shorter.
    """
    if not isinstance(window, (dict, list, tuple)):
        return None  # refused by name where it is read
    size = 1 if isinstance(window, dict) else len(window)
    if size == wanted or last and 0 < size < wanted:
        return None
    return EngineError(
        f"a window of {size} micro-batches, but gradient_accumulation_steps is {wanted}: pass all micro-batches of one "
        "optimizer step at once (a dict, if that is one): only then can their tokens be weighed. The last window of an "
        "epoch may be shorter with last=True; rows that are not trained go under torch.no_grad()"
    )


def mark(batches: list[dict[str, Any]], *, trained: bool = True) -> None:
    """Write each micro-batch's place onto its tensors. They are views: the caller's own tensors are not marked."""
    window = WindowMark(len(batches), trained)
    for index, batch in enumerate(batches):
        divisor = batch.get("num_items_in_batch")
        place = MicroBatchMark(window, index, batch.get("shift_labels"), divisor)
        for key in _MARKED:
            value = batch.get(key)
            if isinstance(value, torch.Tensor) and not value.requires_grad:
                batch[key] = value.view_as(value)
                setattr(batch[key], _MARK, place)


def find_mark(keywords: dict[str, Any]) -> MicroBatchMark | None:
    """Return the place of the micro-batch that a forward pass was given, or None if its tensors are all copies."""
    for key in _MARKED:
        place = getattr(keywords.get(key), _MARK, None)
        if place is not None:
            assert isinstance(place, MicroBatchMark)
            return place
    return None


@dataclass
class Accumulation:
    """What has been computed since the last optimizer step."""

    current: MicroBatchMark | None = None  # of the newest forward pass with gradients
    backwards: int = 0
    _seen: dict[WindowMark, set[int]] = field(default_factory=dict)
    _waiting: set[WindowMark] = field(default_factory=set)  # forward since the newest backward
    _trained: set[WindowMark] = field(default_factory=set)

    def forward(self, place: MicroBatchMark | None) -> None:
        """Count a forward pass with gradients.

        Raises:
            EngineError: the window was cut under ``torch.no_grad()``.
        """
        self.current = place
        if place is None:
            return
        if not place.window.trained:
            raise EngineError(
                "this batch comes from engine.shard under torch.no_grad(), where the number of micro-batches is not "
                "checked: call engine.shard outside of it for a window that is trained, and run forward passes that "
                "are not trained under torch.no_grad()"
            )
        self._seen.setdefault(place.window, set()).add(place.index)
        self._waiting.add(place.window)

    def backward(self) -> None:
        """Count a backward pass."""
        self.backwards += 1
        self._trained |= self._waiting
        self._waiting = set()

    def is_last(self) -> bool | None:
        """Tell whether the current micro-batch completes its window; None where it is not known."""
        return None if self.current is None else self._complete(self.current.window)

    def check_complete(self) -> None:
        """Refuse an optimizer step while a window has been trained in part only: its divisor counts all of it.

        Raises:
            EngineError: with the numbers of micro-batches.
        """
        for window in self._trained:
            if not self._complete(window):
                raise EngineError(
                    f"a window of {window.size} micro-batches was trained in part only ({len(self._seen[window])}) "
                    "before another one was finished: its tokens are weighed over all of them. Train every micro-batch "
                    "of a window before the next (a bad one: multiply its loss by 0), and run forward passes that are "
                    "not trained under torch.no_grad()"
                )

    def _complete(self, window: WindowMark) -> bool:
        return len(self._seen[window]) == window.size

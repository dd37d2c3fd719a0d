"""Track which micro-batch of which accumulation window is being trained, and whether the optimizer step follows it.

An accumulation window (below: window) is the list of micro-batches of one optimizer step. DeepSpeed takes every
``gradient_accumulation_steps``-th call of ``step()`` for the end of a window. That is wrong for the short last window
of an epoch and for loops that call ``step()`` once per window. Here the tensors that ``engine.shard`` and
``engine.weigh`` return are marked with their window's size and their index in it, which does not depend on how the loop
is written.
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
    """One accumulation window: its number of micro-batches, and whether it may be trained."""

    size: int
    trained: bool = True  # False: sharded under torch.no_grad(), with any number of micro-batches


@dataclass(eq=False)
class MicroBatchMark:
    """Micro-batch ``index`` of its window, with what the check of its loss needs."""

    window: WindowMark
    index: int
    labels: torch.Tensor | None = None  # (B, T), shifted
    divisor: torch.Tensor | None = None  # ()


def size_problem(window: Any, wanted: int, last: bool) -> EngineError | None:
    """Return an error if an accumulation window that is to be trained has the wrong number of micro-batches, else None.

    Args:
        window: a list of micro-batches, or one as a dictionary.
        wanted: ``gradient_accumulation_steps``.
        last: the window is the last of an epoch, and may be shorter.
    """
    if not isinstance(window, (dict, list, tuple)):
        return None  # raised where the window is read
    size = 1 if isinstance(window, dict) else len(window)
    if size == wanted or last and 0 < size < wanted:
        return None
    return EngineError(
        f"a window of {size} micro-batches, but gradient_accumulation_steps is {wanted}: pass all micro-batches of one "
        "optimizer step at once (a dict, if that is one): the loss is normalised over all of them. The last window of "
        "an epoch may be shorter with last=True; shard rows that are not trained under torch.no_grad()"
    )


def mark_batches(batches: list[dict[str, Any]], *, trained: bool = True) -> None:
    """Mark each micro-batch's tensors with its index and window. The caller's are replaced by views."""
    window = WindowMark(len(batches), trained)
    for index, batch in enumerate(batches):
        divisor = batch.get("num_items_in_batch")
        mark = MicroBatchMark(window, index, batch.get("shift_labels"), divisor)
        for key in _MARKED:
            value = batch.get(key)
            if isinstance(value, torch.Tensor) and not value.requires_grad:
                batch[key] = value.view_as(value)
                setattr(batch[key], _MARK, mark)


def find_mark(keywords: dict[str, Any]) -> MicroBatchMark | None:
    """Return the mark of the micro-batch in a forward's keywords, or None if all of its tensors are copies."""
    for key in _MARKED:
        mark = getattr(keywords.get(key), _MARK, None)
        if mark is not None:
            assert isinstance(mark, MicroBatchMark)
            return mark
    return None


@dataclass
class Accumulation:
    """Forward and backward passes since the last optimizer step."""

    current: MicroBatchMark | None = None  # of the latest forward pass with gradients
    backwards: int = 0
    _seen: dict[WindowMark, set[int]] = field(default_factory=dict)
    _waiting: set[WindowMark] = field(default_factory=set)  # forward passes since the latest backward
    _trained: set[WindowMark] = field(default_factory=set)

    def note_forward(self, mark: MicroBatchMark | None) -> None:
        """Count a forward pass with gradients.

        Raises:
            EngineError: the window was sharded under ``torch.no_grad()``.
        """
        self.current = mark
        if mark is None:
            return
        if not mark.window.trained:
            raise EngineError(
                "this batch comes from engine.shard under torch.no_grad(), where the number of micro-batches is not "
                "checked: call engine.shard outside of it for a window that is trained, and run forward passes that "
                "are not trained under torch.no_grad()"
            )
        self._seen.setdefault(mark.window, set()).add(mark.index)
        self._waiting.add(mark.window)

    def note_backward(self) -> None:
        """Count a backward pass."""
        self.backwards += 1
        self._trained |= self._waiting
        self._waiting = set()

    def is_last(self) -> bool | None:
        """Return whether the current micro-batch completes its window; None if it has no mark."""
        return None if self.current is None else self._complete(self.current.window)

    def check_complete(self) -> None:
        """Raise if a window has been trained in part only: its loss is divided by the tokens of all micro-batches.

        Raises:
            EngineError: with the numbers of micro-batches.
        """
        for window in self._trained:
            if not self._complete(window):
                raise EngineError(
                    f"a window of {window.size} micro-batches was trained in part only ({len(self._seen[window])}) "
                    "before the optimizer step: its loss is normalised over all of them. Train every micro-batch "
                    "of a window before the next (a bad one: multiply its loss by 0), and run forward passes that are "
                    "not trained under torch.no_grad()"
                )

    def _complete(self, window: WindowMark) -> bool:
        return len(self._seen[window]) == window.size

"""The learning rate as a pure function of the step: nothing to save, nothing that can drift on resume."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(step: int, *, peak: float, warmup: int, total: int, schedule: str, final_ratio: float = 0.0) -> float:
    """Return the learning rate of the update number ``step`` (from 1).

    It rises linearly to ``peak`` at update ``warmup``, then follows the schedule down to ``final_ratio * peak`` at
    update ``total`` and stays there.

    Raises:
        ValueError: the schedule is not one of ``SCHEDULES``.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if step <= warmup:
        return peak * step / max(warmup, 1)
    if schedule == "constant":
        return peak
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    height = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return peak * (final_ratio + (1 - final_ratio) * height)

"""What the user sees while it runs: one live line on a terminal, plain lines elsewhere, nothing from other ranks."""

from __future__ import annotations

import time
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from longctx.train.report.console import Console


class ProgressDisplay:
    """Prints notices and a line per step. With ``stream`` None (every rank but 0) it prints nothing.

    Args:
        stream: rank 0's console.
        total: steps of the whole run.
        every: plain lines are printed every so many steps.
        columns: width of the terminal that ``stream`` leads to, where it is one only at its far end; else 0.
    """

    def __init__(self, stream: TextIO | None, total: int, every: int = 1, columns: int = 0) -> None:
        self.total, self.every = total, every
        far: dict[str, Any] = {"force_terminal": True, "width": columns} if columns else {}
        self._console: RichConsole | None = None
        if stream is not None:
            guarded: Any = stream if isinstance(stream, Console) else Console(stream)  # losing it must not end the run
            self._console = RichConsole(file=guarded, highlight=False, soft_wrap=True, **far)
        self._live: Live | None = None
        self._recent: list[float] = []

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._console is not None:
            self._console.print(Text(text))

    def step(self, record: dict[str, Any]) -> None:
        """Show a step's numbers: a live line on a terminal, else a line every ``every`` steps."""
        if self._console is None:
            return
        self._recent = [*self._recent[-19:], time.monotonic()]
        text = self._line(record)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4, transient=True)
                self._live.start()
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"))
        elif record["step"] % self.every == 0 or record["step"] == self.total:
            self.say(text)
        if self._console.is_terminal and "eval_loss" in record:
            self.say(text)

    def close(self) -> None:
        """Take the live line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, record: dict[str, Any]) -> str:
        parts = [f"step {record['step']}/{self.total}", f"loss {record['loss']:.4f}"]
        if record.get("eval_loss") is not None:
            parts.append(f"held-out {record['eval_loss']:.4f}")
        if record.get("skipped_steps"):
            parts.append(f"{record['skipped_steps']} skipped (fp16), loss scale {record['loss_scale']:g}")
        if record.get("grad_norm") is not None:
            parts.append(f"norm {record['grad_norm']:.2f}")
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        if record.get("mfu") is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        parts.append(f"{record['peak_memory_bytes'] / 2**30:.2f} GiB")
        left = self._seconds_left(record["step"])
        if left is not None:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _seconds_left(self, step: int) -> float | None:
        if len(self._recent) < 2:
            return None
        pace = (self._recent[-1] - self._recent[0]) / (len(self._recent) - 1)
        return pace * (self.total - step)


def duration(seconds: float) -> str:
    """Return a length of time as people write it: 45 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

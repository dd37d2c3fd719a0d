"""One kernel launch as data, so that tests can compile exactly what runs, ahead of time and for other chips."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from triton.runtime.interpreter import InterpretedFunction

# The interpreter keeps the running program's grid index in a global, and simulated ranks are threads.
_INTERPRETING = threading.Lock()


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its arguments by name, and how many warps and pipeline stages it is compiled for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 1

    def run(self) -> None:
        """Launch the kernel; nothing if the grid is empty."""
        if 0 in self.grid:
            return
        if isinstance(self.kernel, InterpretedFunction):
            with _INTERPRETING:
                self._start()
        else:
            self._start()

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options. Fused multiply-adds are enabled explicitly: they are not the default since Triton
        3.10."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def _start(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)

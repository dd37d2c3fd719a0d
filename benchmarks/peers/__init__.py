"""One file per peer. Each names the package and the version it was written for, and returns a step function.

A step takes this rank's ``(q, k, v, grad_out)``, each (B, H, T, D), and returns ``(out, dq, dk, dv)``. ``positions``
returns the global indices of a rank's tokens, so that one harness shards, gathers and compares for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch

Tensors = tuple[torch.Tensor, ...]
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Tensors]


class NotMeasured(Exception):
    """Raised where a peer cannot run; the message is the reason that the report prints."""


def installed(package: str, pinned: str | None) -> str:
    """Return the installed version of ``package`` (longctx: the checkout's).

    Raises:
        NotMeasured: it is absent, or not the ``pinned`` version.
    """
    if package == "longctx":
        import longctx

        return longctx.__version__
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise NotMeasured(f"{package} is not installed") from None
    if pinned is not None and found.split("+")[0] != pinned:
        raise NotMeasured(f"{package} {found} is installed, this adapter was written for {pinned}")
    return found


@dataclass(frozen=True)
class Contestant:
    """An implementation to measure: ``load`` imports the package and returns its step, or raises NotMeasured."""

    name: str
    package: str
    pinned: str | None
    load: Callable[[], Step]
    positions: Callable[[int, int, int], torch.Tensor]  # (rank, ranks, length) → (T,) int64
    ranks: str = "all"  # or "first": one process does all the work
    threads: int = 1
    split_heads: bool = False  # each rank computes its share of the heads, without communication
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    longest: int | None = None  # beyond this length a single step takes minutes

    def computes(self, rank: int) -> bool:
        """Whether this rank does any of the work."""
        return self.ranks == "all" or rank == 0

    def version(self) -> str:
        """Return the installed version, or raise NotMeasured."""
        return installed(self.package, self.pinned)


def whole(rank: int, ranks: int, length: int) -> torch.Tensor:
    """Every token on every rank."""
    return torch.arange(length)


def contiguous(rank: int, ranks: int, length: int) -> torch.Tensor:
    """Token block ``rank`` of ``ranks``."""
    return torch.arange(length).view(ranks, -1)[rank]


def zigzag(rank: int, ranks: int, length: int) -> torch.Tensor:
    """Chunks ``rank`` and ``2·ranks − 1 − rank`` of ``2·ranks``, so that causal work is equal."""
    chunks = torch.arange(length).view(2 * ranks, -1)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def by_autograd(attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
    """Turn a differentiable ``attention(q, k, v) → out`` into a step."""

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor) -> Tensors:
        q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        out = attention(q, k, v)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)

    return step

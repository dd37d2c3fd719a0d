"""ABC's control strategies, which decide the slots that each token is written to. Each is a frozen dataclass.

A strategy gives one of three things per token and slot:

    logits   the normalizer turns them into weights (a learned control passes its logits directly, without a strategy)
    slots    logits 0 and -inf: a token belongs to a slot or not; the normalizer "sum" adds without dividing
    weights  used as they are, and summed: no normalizer applies

or, for queues of tokens (`Fifo`), the ranges of tokens in view. Position-dependent strategies use a token's index
within its document, so the ranks of a ring, and any split of a sequence, agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longctx.attention.arguments import wrapped
from longctx.bounded.abc import clusters
from longctx.bounded.ranks.sequence import LocalTokens
from longctx.bounded.state import ABCState
from longctx.errors import AttentionError


@dataclass(frozen=True)
class Control:
    """A control strategy; the functions below create them."""

    kind: ClassVar[str] = "logits"
    positional: ClassVar[bool] = False
    """Whether it needs the index of a token in its document; states then count tokens."""

    def control(self, k: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, causal: bool) -> torch.Tensor:
        """Return (B, G, T, M) for keys k (B, G, T, D) at `index` (B or 1, T) of their documents."""
        raise AttentionError(f"{type(self).__name__} writes no weights: it is a queue of tokens")


@dataclass(frozen=True)
class Random(Control):
    """Assign every token to one slot by a hash of the seed, the head and the token's index."""

    slots: int
    seed: int = 0
    kind: ClassVar[str] = "slots"
    positional: ClassVar[bool] = True

    def control(self, k: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, causal: bool) -> torch.Tensor:
        heads = torch.arange(k.shape[1], device=k.device)[:, None]
        mixed = _mix(_mix(index[:, None] + _mix(heads + wrapped(self.seed))))
        slot = (mixed & (2**62 - 1)) % self.slots
        return _members(slot.expand(k.shape[0], -1, -1), self.slots, k.dtype)


@dataclass(frozen=True)
class Identity(Control):
    """Write token i to slot i: softmax attention over all tokens so far, for tests; `slots` bounds the length."""

    slots: int | None = None
    kind: ClassVar[str] = "slots"
    positional: ClassVar[bool] = True

    def control(self, k: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, causal: bool) -> torch.Tensor:
        slots = k.shape[2] if self.slots is None else self.slots
        _check_room("identity", slots, index, valid)
        slot = index.clamp_max(slots - 1)[:, None]
        return _members(slot.expand(k.shape[0], k.shape[1], -1), slots, k.dtype)


@dataclass(frozen=True)
class Linformer(Control):
    """Write token i with column i of `weight` (G or 1, M, S_max), learned per position."""

    weight: torch.Tensor
    kind: ClassVar[str] = "weights"
    positional: ClassVar[bool] = True

    def control(self, k: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, causal: bool) -> torch.Tensor:
        weight = self.weight
        if weight.shape[0] not in (1, k.shape[1]):
            raise AttentionError(
                f"linformer weight {tuple(weight.shape)}: expected (1, M, S_max), or ({k.shape[1]}, M, S_max) for "
                f"{k.shape[1]} key heads"
            )
        _check_room("linformer", weight.shape[2], index, valid)
        columns = weight.permute(2, 0, 1)[index.clamp(0, weight.shape[2] - 1)]  # (B or 1, T, G or 1, M)
        return columns.transpose(1, 2).expand(k.shape[0], k.shape[1], -1, -1)


@dataclass(frozen=True)
class Cluster(Control):
    """Assign a token to the slot whose centroid is nearest its key; the slot's keys then average to that centroid.

    Bidirectional: k-means over all keys, `iterations` rounds from evenly spaced tokens. Causal: the first M tokens of a
    document start one slot each, later tokens join the nearest centroid, and centroids are updated every 64 tokens. No
    gradient flows through the assignment.
    """

    slots: int
    iterations: int = 5
    kind: ClassVar[str] = "slots"
    positional: ClassVar[bool] = True

    def control(self, k: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, causal: bool) -> torch.Tensor:
        index = index.expand(k.shape[0], -1)
        begins = index == 0  # of a document
        ids = begins.cumsum(1) if valid is None else (begins & valid).cumsum(1).masked_fill(~valid, -1)
        return _members(clusters.assign(k.detach(), ids, self.slots, self.iterations), self.slots, k.dtype)

    def online(
        self, k: torch.Tensor, index: torch.Tensor, local: LocalTokens, state: ABCState | None, total: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the control of causal attention, and `ABCState.clusters` after it, on a ring only if `total`."""
        if state is None or state.clusters is None:
            seen, document = clusters.empty(k, self.slots), torch.full((k.shape[0],), -1, device=k.device)
        else:
            known = state.document
            seen = state.clusters.detach()
            document = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device) if known is None else known
        slot, seen = clusters.over_ranks(k.detach(), index.expand(k.shape[0], -1), local, seen, document, total)
        return _members(slot, self.slots, k.dtype), seen


@dataclass(frozen=True)
class Fifo(Control):
    """A queue of the document's tokens.

    recent: number of latest tokens in view, the token itself included. strided: number of older entries in view, one
    every `stride` tokens (dilated's rate, compressive's ratio). An entry is the last token of its stride, or with
    `pooled` the mean of the stride, in view once all of its tokens have left the recent ones.
    """

    recent: int
    strided: int = 0
    stride: int = 1
    pooled: bool = False
    kind: ClassVar[str] = "fifo"


def random(slots: int, seed: int = 0) -> Control:
    """Write each token to one random slot (ABC_RD in the paper)."""
    _check_positive("random", slots=slots)
    return Random(slots, seed)


def identity(slots: int | None = None) -> Control:
    """Give each token its own slot (softmax attention); for tests."""
    return Identity(slots)


def linformer(weight: torch.Tensor) -> Control:
    """Project as Linformer does, learned per position, causal or not; weight (G or 1, M, S_max), differentiable."""
    if weight.dim() != 3 or not weight.is_floating_point():
        raise AttentionError(f"linformer weight {tuple(weight.shape)} of {weight.dtype}: expected (G or 1, M, S_max)")
    return Linformer(weight)


def cluster(slots: int, iterations: int = 5) -> Control:
    """Make slots clusters of keys (ABC_CL in the paper)."""
    _check_positive("cluster", slots=slots, iterations=iterations)
    return Cluster(slots, iterations)


def window(slots: int) -> Control:
    """Keep a queue of the last `slots` tokens (ABC_WD in the paper)."""
    _check_positive("window", slots=slots)
    return Fifo(slots)


def dilated(slots: int, rate: int) -> Control:
    """Keep a queue of the token itself and the last tokens of the `slots - 1` strides of `rate` tokens before it."""
    _check_positive("dilated", slots=slots, rate=rate)
    return Fifo(slots) if rate == 1 else Fifo(1, slots - 1, rate)


def compressive(slots: int, ratio: int) -> Control:
    """Keep the Compressive Transformer's queue: half of the slots hold the last tokens, the others means of `ratio`
    older tokens each."""
    _check_positive("compressive", slots=slots, ratio=ratio)
    return Fifo(slots - slots // 2, slots // 2, ratio, pooled=True)


def _members(slot: torch.Tensor, slots: int, dtype: torch.dtype) -> torch.Tensor:
    """Return logits (B, G, T, M) that are 0 in each token's slot (B, G, T) and -inf elsewhere."""
    belongs = slot[..., None] == torch.arange(slots, device=slot.device)
    return torch.zeros(belongs.shape, dtype=dtype, device=slot.device).masked_fill_(~belongs, -torch.inf)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Hash int64 bijectively (the finalizer of splitmix64)."""
    x = x + wrapped(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * wrapped(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * wrapped(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _check_positive(name: str, **sizes: int) -> None:
    for field, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise AttentionError(f"{name}({field}={size!r}): give a positive integer")


def _check_room(name: str, room: int, index: torch.Tensor, valid: torch.Tensor | None) -> None:
    last = index if valid is None else index.masked_fill(~valid, 0)
    longest = int(last.max()) + 1
    if longest > room:
        raise AttentionError(
            f"{name}: a document of {longest} tokens, and the control has {room} positions; make it longer, or "
            "choose a control without positions"
        )

"""Exact softmax attention to the last tokens, with a state that holds just these: the mixer of ``window`` layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from longctx.attention.block import block_attention
from longctx.attention.ring import ring_attention
from longctx.bounded.state import State
from longctx.errors import AttentionError
from longctx.layout import Layout
from longctx.mesh import Mesh
from longctx.nn.kinds import Window
from longctx.sharding import positions


@dataclass(frozen=True)
class WindowState(State):
    """The last tokens of every row: keys (B, G, n, D), values (B, G, n, Dv), documents (B, n) int64 (-1: padding)."""

    keys: torch.Tensor
    values: torch.Tensor
    documents: torch.Tensor


class WindowMixer(torch.nn.Module):
    """Exact attention to the last ``size`` tokens. It has no parameters."""

    exact = True  # softmax over tokens, so softcap, sinks and dropout apply

    def __init__(self, kind: Window) -> None:
        super().__init__()
        self.kind = kind

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        inputs: torch.Tensor | None = None,
        *,
        causal: bool = True,
        scale: float | None = None,
        mesh: Any = None,
        layout: Any = "zigzag",
        document_ids: torch.Tensor | None = None,
        length: int | None = None,
        state: WindowState | None = None,
        return_state: bool = False,
        backend: str = "auto",
        **extras: Any,
    ) -> Any:
        """Attend as ``ABCMixer.forward`` does; if not causal, the window extends equally far to the right."""
        size = self.kind.size
        window: int | tuple[int, int] = size if causal else (size - 1, size - 1)
        ids = document_ids
        ring = mesh is not None and mesh.sequence_size > 1
        if ring and state is not None:
            raise AttentionError("window: a state on a ring of ranks; run without a mesh, or without a state")
        if not return_state or ring:
            out = ring_attention(
                query, key, value, mesh=mesh, layout="contiguous" if mesh is None else layout, causal=causal,
                window=window, document_ids=ids if ids is None else ids.to(torch.int32), length=length, scale=scale,
                backend=backend, **extras,
            )  # fmt: skip
            return (out, last_tokens(key, value, ids, size - 1, mesh, layout, length)) if return_state else out
        if ids is None:
            ids = torch.zeros(key.shape[0], key.shape[2], dtype=torch.int64, device=key.device)
        keys, values, all_ids = key, value, ids
        if state is not None:
            keys, values = torch.cat([state.keys, key], 2), torch.cat([state.values, value], 2)
            all_ids = torch.cat([state.documents, ids], 1)
        out, _ = block_attention(
            query, keys, values, causal=causal, window=window, scale=scale, document_ids=ids.to(torch.int32),
            key_document_ids=all_ids.to(torch.int32), **extras,
        )  # fmt: skip
        first = max(keys.shape[2] - (size - 1), 0)
        # clone: a slice would keep the whole tensor alive
        return out, WindowState(keys[:, :, first:].clone(), values[:, :, first:].clone(), all_ids[:, first:].clone())


WindowMemory = WindowMixer  # former name


def last_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    document_ids: torch.Tensor | None,
    count: int,
    mesh: Mesh,
    layout: str | Layout,
    length: int | None,
) -> WindowState:
    """Gather the last ``count`` tokens of a sharded sequence on every rank, detached.

    One all-reduce of ``count`` tokens, regardless of the sequence's length.

    Args:
        key, value, document_ids: of this rank's tokens.
        length: of the whole sequence; None: it fills all ranks.
    """
    whole = key.shape[2] * mesh.sequence_size
    index = positions(whole, mesh, layout).to(key.device)
    length = whole if length is None else length
    count = min(count, length)
    here = (index >= length - count) & (index < length)
    columns = index[here] - (length - count)
    ids = torch.zeros(len(key), key.shape[2], device=key.device) if document_ids is None else document_ids
    parts = []
    for x in (key, value, ids.to(torch.int64)[:, None, :, None]):
        part = x.new_zeros(*x.shape[:2], count, x.shape[3])
        part[:, :, columns] = x[:, :, here].detach()  # each token is on one rank, so a sum over ranks gathers
        if count:
            dist.all_reduce(part, group=mesh.sequence_group)
        parts.append(part)
    return WindowState(parts[0], parts[1], parts[2][:, 0, :, 0])

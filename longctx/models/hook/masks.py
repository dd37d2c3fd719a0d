"""The mask function that transformers calls for ``attn_implementation="longctx"``: document ids instead of a T×T mask.

transformers hands a mask function the *rule* of the mask (a closure over closures) and the padding. We read the rule
instead of evaluating it: causal or not, which window, which packed sequence. What travels on to the attention function
is one int32 number per key: its document, or -1 for padding. A rule that we cannot honour is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from longctx.errors import ModelError


class Rule(NamedTuple):
    """What a transformers mask says, without its T×T values."""

    causal: bool
    window: int | None  # keys visible to the left including self (and as many to the right if not causal)
    documents: torch.Tensor | None  # (B or 1, T) ids of packed sequences, found by transformers from position_ids


@torch.compiler.disable  # it looks into closures, which a compiler cannot
def document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor:
    """Return the documents of the keys, registered as transformers' mask function under the name "longctx".

    Args:
        mask_function: the closure that transformers would evaluate at every (query, key).
        attention_mask: (B, keys seen) bool, False at padding; None without padding.

    Returns:
        (B, 1, 1, kv_length) int32: equal numbers are one document, -1 is padding; (B, 1, 1, 1) zeros where the mask
        says nothing of documents or padding. Four dimensions, because some models slice a mask's last one.

    Raises:
        ModelError: the rule is none of causal, full, sliding window, packed sequences and padding.
    """
    if use_vmap:
        raise ModelError(
            "this model lays a mask of its own over the attention (or_mask_function / and_mask_function), which "
            "longctx does not honour; use attn_implementation='sdpa' for it, without sharding"
        )
    rule = read_rule(mask_function)
    static = isinstance(q_offset, torch.Tensor)
    if static or (rule.causal and q_offset + q_length != kv_offset + kv_length):
        raise ModelError(
            f"{q_length} queries, {kv_length} keys, and the queries do not end where the keys end: longctx attends "
            "to a cache that grows (cache_implementation='dynamic'), not to a StaticCache"
        )
    ids: torch.Tensor | None = None
    if rule.documents is not None:
        ids = rule.documents.to(torch.int32).expand(batch_size, -1)
    if attention_mask is not None:
        valid = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        if valid.shape[1] < kv_length:  # keys that no mask speaks of are not written yet, as in transformers
            valid = torch.nn.functional.pad(valid, (0, kv_length - valid.shape[1]))
        start = ids if ids is not None else torch.zeros_like(valid, dtype=torch.int32)
        ids = torch.where(valid, start, -1).to(torch.int32)
    if ids is None:
        ids = torch.zeros(1, 1, dtype=torch.int32, device=device).expand(batch_size, 1)
    mask = ids[:, None, None, :]
    # Read by the attention function to check itself against the mask; lost where a checkpoint recomputes, which is
    # after the first forward has been checked.
    mask.longctx_rule = Rule(rule.causal, rule.window, None)  # type: ignore[attr-defined]
    return mask


def read_rule(mask_function: Callable[..., Any] | None) -> Rule:
    """Return what a mask closure of transformers.masking_utils says, or raise ModelError naming its part."""
    parts = _parts(mask_function)
    causal = any(name == "causal_mask_function" for name, _ in parts)
    window: int | None = None
    documents: torch.Tensor | None = None
    for name, variables in parts:
        if name == "sliding_window_overlay":
            window = int(variables["sliding_window"])
        elif name == "sliding_window_bidirectional_overlay":
            window = int(variables["sliding_window"]) + 1  # transformers counts the distance here, not the keys
        elif name == "packed_sequence_mask_function":
            documents = variables["packed_sequence_mask"]
    return Rule(causal, window, documents)


_LEAVES = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
)


def _parts(mask_function: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return (factory name, closed-over variables) of every leaf of a conjunction of mask functions."""
    if mask_function is None:
        return [("causal_mask_function", {})]
    name = getattr(mask_function, "__qualname__", repr(mask_function)).split(".<locals>")[0]
    home = getattr(mask_function, "__module__", "")
    if home == "transformers.masking_utils":
        variables = dict(inspect.getclosurevars(mask_function).nonlocals)
        if name == "and_masks":
            return [leaf for part in variables["mask_functions"] for leaf in _parts(part)]
        if name == "remap_positions_for_packed_sequence":  # inside a document, index and position differ by a constant
            return _parts(variables["mask_function"])
        if name in _LEAVES:
            return [(name, variables)]
    raise ModelError(
        f"this model masks its attention with {home}.{name}, which longctx does not honour (it knows causal, full, "
        "sliding window, packed and padded); use attn_implementation='sdpa' for it, without sharding"
    )


def documents_from_positions(position_ids: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return (B, T) int32 document numbers: a document starts wherever a position is not its predecessor plus one.

    Args:
        position_ids: (B, T).
        valid: (B, T) bool, False at padding, whose positions say nothing. Behind padding a document goes on if its
            positions do, whether they counted the padding or not. Padding has the number of the document before it.
    """
    if valid is None:
        starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        return torch.nn.functional.pad(starts, (1, 0)).cumsum(-1, dtype=torch.int32)
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand(position_ids.shape)
    before = _last_valid(valid)
    gap = index - before
    step = position_ids - position_ids.gather(1, before.clamp(min=0))
    starts = valid & (before >= 0) & (step != 1) & (step != gap)
    return starts.cumsum(-1, dtype=torch.int32)


def separate_runs(document_ids: torch.Tensor) -> torch.Tensor:
    """Return (B, T) ids in which an id that comes back after another one is a document of its own.

    Args:
        document_ids: (B, T) integers, negative for padding, which does not end a run.

    Returns:
        the rows as they are where no id comes back; elsewhere the numbers 0, 1, 2, … of their runs, −1 for padding.
    """
    valid = document_ids >= 0
    before = _last_valid(valid)
    changed = document_ids != document_ids.gather(1, before.clamp(min=0))
    starts = valid & (before >= 0) & changed
    ordered = document_ids.sort(1).values
    distinct = ((ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, :-1] >= 0)).sum(1, keepdim=True)
    returns = starts.sum(1, keepdim=True) > distinct
    runs = starts.cumsum(1).to(document_ids.dtype).masked_fill(~valid, -1)
    return torch.where(returns, runs, document_ids)


def _last_valid(valid: torch.Tensor) -> torch.Tensor:
    """Return (B, T) the index of the last valid token before each token, −1 where there is none."""
    index = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    last = torch.where(valid, index, -1).cummax(1).values
    return torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)

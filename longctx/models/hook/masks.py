"""The mask function that transformers calls for ``attn_implementation="longctx"``: document ids instead of a T×T mask.

transformers passes a mask function the *rule* of the mask (nested closures) and the padding. The rule is parsed instead
of evaluated: causal or not, which window, which packed documents. The attention function gets one int32 per key, its
document id, or -1 for padding. A rule that is not supported raises an error with its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from longctx.errors import ModelError


class MaskRule(NamedTuple):
    """A transformers mask as parameters, without its T×T values."""

    causal: bool
    window: int | None  # keys visible to the left including self (and as many to the right if not causal); None: all
    documents: torch.Tensor | None  # (B or 1, T) ids of packed documents that transformers derived from position_ids


@torch.compiler.disable  # the compiler cannot inspect closures
def document_ids_as_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor:
    """Return the keys' document ids; registered as transformers' mask function under the name "longctx".

    Args:
        mask_function: the closure that transformers would evaluate for every (query, key).
        attention_mask: (B, keys seen) bool, False at padding; None without padding.

    Returns:
        (B, 1, 1, kv_length) int32 document ids, -1 at padding; (B, 1, 1, 1) zeros without documents and padding. Four
        dimensions, because some models slice a mask's last one.

    Raises:
        ModelError: the rule is not a combination of causal, full, sliding window, packed documents and padding.
    """
    if use_vmap:
        raise ModelError(
            "this model combines the mask with one of its own (or_mask_function / and_mask_function), which "
            "longctx does not support; use attn_implementation='sdpa' for it, without sharding"
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
        if valid.shape[1] < kv_length:  # as in transformers, keys beyond the mask are not written yet
            valid = torch.nn.functional.pad(valid, (0, kv_length - valid.shape[1]))
        start = ids if ids is not None else torch.zeros_like(valid, dtype=torch.int32)
        ids = torch.where(valid, start, -1).to(torch.int32)
    if ids is None:
        ids = torch.zeros(1, 1, dtype=torch.int32, device=device).expand(batch_size, 1)
    mask = ids[:, None, None, :]
    # The attention function compares its keywords with this rule. Recomputation under activation checkpointing loses
    # the attribute, but only after the first forward, which has been checked.
    mask.longctx_rule = MaskRule(rule.causal, rule.window, None)  # type: ignore[attr-defined]
    return mask


def read_rule(mask_function: Callable[..., Any] | None) -> MaskRule:
    """Parse a mask closure of transformers.masking_utils; raise ModelError with the name of an unsupported part."""
    parts = _parts(mask_function)
    causal = any(name == "causal_mask_function" for name, _ in parts)
    window: int | None = None
    documents: torch.Tensor | None = None
    for name, variables in parts:
        if name == "sliding_window_overlay":
            window = int(variables["sliding_window"])
        elif name == "sliding_window_bidirectional_overlay":
            window = int(variables["sliding_window"]) + 1  # transformers gives the distance here, without self
        elif name == "packed_sequence_mask_function":
            documents = variables["packed_sequence_mask"]
    return MaskRule(causal, window, documents)


_LEAVES = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
)


def _parts(mask_function: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return (factory name, closure variables) of every leaf of a conjunction of mask functions."""
    if mask_function is None:
        return [("causal_mask_function", {})]
    name = getattr(mask_function, "__qualname__", repr(mask_function)).split(".<locals>")[0]
    home = getattr(mask_function, "__module__", "")
    # Only closures of transformers itself are known by name: a model's own function may have any meaning.
    if home == "transformers.masking_utils":
        variables = dict(inspect.getclosurevars(mask_function).nonlocals)
        if name == "and_masks":
            return [leaf for part in variables["mask_functions"] for leaf in _parts(part)]
        if name == "remap_positions_for_packed_sequence":  # inside a document, index and position differ by a constant
            return _parts(variables["mask_function"])
        if name in _LEAVES:
            return [(name, variables)]
    raise ModelError(
        f"this model masks its attention with {home}.{name}, which longctx does not support (it knows causal, full, "
        "sliding window, packed and padded); use attn_implementation='sdpa' for it, without sharding"
    )


def documents_from_positions(position_ids: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return (B, T) int32 document ids: a document starts where a position is not the previous one plus one.

    Args:
        position_ids: (B, T).
        valid: (B, T) bool, False at padding, whose positions are ignored. After padding a document continues if its
            positions do, whether or not they count the padding. Padding gets the id of the document before it; the
            caller overwrites it with -1.
    """
    if valid is None:
        starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        return torch.nn.functional.pad(starts, (1, 0)).cumsum(-1, dtype=torch.int32)
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand(position_ids.shape)
    # Compare each token with the last valid one before it. The document continues if positions advance by 1 (padding
    # is not counted) or by the distance of the two tokens (padding is counted).
    before = _last_valid(valid)
    gap = index - before
    step = position_ids - position_ids.gather(1, before.clamp(min=0))
    starts = valid & (before >= 0) & (step != 1) & (step != gap)
    return starts.cumsum(-1, dtype=torch.int32)


def separate_runs(document_ids: torch.Tensor) -> torch.Tensor:
    """Return (B, T) ids in which an id that reappears after another one is a new document.

    Args:
        document_ids: (B, T) integers, negative for padding, which does not end a run.

    Returns:
        rows unchanged if no id reappears; otherwise the numbers 0, 1, 2, … of their runs, −1 for padding.
    """
    valid = document_ids >= 0
    before = _last_valid(valid)
    changed = document_ids != document_ids.gather(1, before.clamp(min=0))
    starts = valid & (before >= 0) & changed
    # A row has one run per distinct id unless an id reappears: compare the number of run starts after the first run
    # with the number of distinct ids after the first.
    ordered = document_ids.sort(1).values
    distinct = ((ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, :-1] >= 0)).sum(1, keepdim=True)
    returns = starts.sum(1, keepdim=True) > distinct
    runs = starts.cumsum(1).to(document_ids.dtype).masked_fill(~valid, -1)
    return torch.where(returns, runs, document_ids)


def _last_valid(valid: torch.Tensor) -> torch.Tensor:
    """Return (B, T) the index of the last valid token before each token, −1 if there is none."""
    index = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    last = torch.where(valid, index, -1).cummax(1).values
    return torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)

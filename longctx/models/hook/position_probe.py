"""Measure how a model counts positions, and verify that no module in it counts the tokens of a shard.

A shard begins in the middle of a row, so a module that numbers its input tokens (``arange``, the length of a cache, a
cumulative sum of the mask) is silently wrong there. And a model with its own numbering (RoBERTa counts from
``padding_idx + 1``, OPT counts valid tokens) would train other rows of its table if it got 0, 1, 2, …. Instead of lists
of model names, the model itself runs a few times on eight tokens, without gradients and with attention replaced by a
function that mixes no tokens:

- **eight equal tokens at equal positions** must give equal outputs, else a module counts tokens;
- **without position_ids** it must give the outputs of some position_ids, which shows what it counts, and from where.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from longctx.errors import ModelError
from longctx.models.hook.binding import Binding
from longctx.models.hook.positions import PLAIN, PositionRule, table_of_positions
from longctx.models.hook.trace import Trace, judge

_TOKENS, _PADDED = 8, 3
_POSITION = 3  # of all tokens in the first run
_TRIED = 8  # largest first position that is tried


def without_mixing(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return (B, T, H, Dv), a function of each token's own query, key and value; replaces attention in a probe.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D).
        value: (B, G, T, Dv).
    """
    heads = query.shape[1]
    out = value.repeat_interleave(heads // value.shape[1], 1)
    for weight, x in ((1.0, query), (0.5, key.repeat_interleave(heads // key.shape[1], 1))):
        for part in x.split(out.shape[-1], -1):  # rotary positions may be in any part of a head
            out = out + weight * torch.nn.functional.pad(part, (0, out.shape[-1] - part.shape[-1]))
    return out.transpose(1, 2).contiguous()


def position_rule(model: torch.nn.Module, binding: Binding) -> PositionRule:
    """Return how ``model`` counts positions, measured on the first call; raise if it would be wrong on a shard.

    Communicates only to gather partitioned weights: under ZeRO-3, collective over the world.

    Raises:
        ModelError: the sequence is sharded, and a module numbers its input tokens, mixes them outside of attention, or
            does not run with longctx's attention at all.
    """
    if binding.rule is None:
        binding.rule = PLAIN  # while the probe itself runs
        try:
            with _probing(model, binding):
                if binding.sharded:
                    _refuse_counting(model, binding)
                binding.rule = _find_rule(model, binding)
        except BaseException as problem:
            binding.rule = None
            name = type(model).__name__
            if isinstance(problem, ModelError) and name not in str(
                problem
            ):  # errors of the mask function do not name the model
                raise ModelError(f"{name}: {problem}") from problem
            raise
    return binding.rule


@contextmanager
def _probing(model: torch.nn.Module, binding: Binding) -> Iterator[None]:
    """Put the model into eval mode, without gradients and compilation, and restore everything afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        binding.probe_records = None
        for module, training in modes:
            module.training = training


def _run(model: torch.nn.Module, binding: Binding, **inputs: Any) -> list[torch.Tensor]:
    """Return the tokens' features in every attention layer and in the output: a list of (T, features) fp32."""
    binding.probe_records = []
    binding.called.clear()
    try:
        output = model(**inputs, use_cache=False) if _keeps_a_cache(model) else model(**inputs)
        records = binding.probe_records
    finally:
        binding.probe_records = None
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    if logits is None:
        logits = getattr(output, "last_hidden_state", None)
    tokens = inputs["input_ids"].shape[1]
    if isinstance(logits, torch.Tensor) and logits.dim() == 3 and logits.shape[1] == tokens:
        records.append(logits[0].float())
    return records


def _keeps_a_cache(model: Any) -> bool:
    return hasattr(getattr(model, "config", None), "use_cache")


def _refuse_counting(model: torch.nn.Module, binding: Binding) -> None:
    """Raise ModelError if equal tokens at equal positions give different outputs, or a layer bypasses longctx."""
    name = type(model).__name__
    token = torch.full((1, _TOKENS), _token(model), device=binding.mesh.device)
    inputs = {
        "input_ids": token,
        "position_ids": torch.full_like(token, _POSITION),
        "document_ids": torch.zeros_like(token, dtype=torch.int32),
    }
    trace = Trace(model, _TOKENS)
    try:
        with trace:
            records = _run(model, binding, **inputs)
    except ModelError:
        raise
    except Exception as problem:
        raise ModelError(
            f"{name} does not run with longctx's attention: {trace.inside or name} raised {type(problem).__name__}: "
            f"{problem}. It cannot be sharded (docs/models.md)"
        ) from problem
    judge(model, trace.ran, binding.called)
    if all(_difference(x, x[:1].expand_as(x)) <= _slack(model) for x in records):
        return
    raise ModelError(
        f"{name} cannot run on a shard: {trace.first or name} gives equal tokens at equal position_ids different "
        "values, so it counts its input tokens, or mixes them outside of attention. On a shard both would "
        "be local and silently wrong; use a model that takes its positions from position_ids (docs/models.md)"
    )


def _find_rule(model: torch.nn.Module, binding: Binding) -> PositionRule:
    """Return the rule for which outputs with the model's own positions equal outputs with given ones."""
    device, token = binding.mesh.device, _token(model)
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    length = min(_TOKENS + _TRIED, table_of_positions(model) or _TOKENS + _TRIED)
    tokens = torch.full((1, _TOKENS), token, device=device)
    mask = (torch.arange(_TOKENS, device=device) >= _PADDED).long()[None]
    try:
        given = _run(
            model, binding, input_ids=torch.full((1, length), token, device=device),
            position_ids=torch.arange(length, device=device)[None],
        )  # fmt: skip
        own = _run(model, binding, input_ids=tokens)
        masked = _run(model, binding, input_ids=tokens, attention_mask=mask)
        padded = masked
        if isinstance(pad, int) and pad != token:
            padded = _run(model, binding, input_ids=tokens.masked_fill(mask == 0, pad), attention_mask=mask)
    except ModelError:
        raise
    except Exception as problem:
        if binding.sharded:
            raise ModelError(
                f"{type(model).__name__} does not run on input_ids alone ({type(problem).__name__}: {problem}), so how "
                "it counts positions is not known; it cannot be sharded (docs/models.md)"
            ) from problem
        return PLAIN  # not an error on one device; the model's own forward reports what it needs
    slack = _slack(model)
    # First position: the offset at which the unpadded run without positions matches given positions.
    errors = [_mismatch(own, given, 0, first) for first in range(length - _TOKENS + 1)]
    first = 0 if errors[0] <= slack else min(range(len(errors)), key=errors.__getitem__)
    if errors[first] <= slack:
        # What is counted: compare left-padded runs with positions that count padding, or do not.
        if _mismatch(padded, given, _PADDED, first + _PADDED) <= slack:
            return PositionRule("index", first)
        if _mismatch(masked, given, _PADDED, first) <= slack:
            return PositionRule("mask", first)
        if _mismatch(padded, given, _PADDED, first) <= slack:
            return PositionRule("tokens", first, pad)
    if not binding.sharded:
        return PLAIN
    raise ModelError(
        f"{type(model).__name__} cannot be sharded: its own positions of a padded row are neither the indices of "
        "the tokens in the row nor counts of those that are not padding (docs/models.md)"
    )


def _mismatch(own: list[torch.Tensor], given: list[torch.Tensor], start: int, position: int) -> float:
    """Return the relative difference of tokens from ``start`` on and those at positions from ``position`` on."""
    if len(own) != len(given):
        return float("inf")
    pairs = ((x[start:], y[position : position + len(x) - start]) for x, y in zip(own, given, strict=True))
    return max((_difference(x, y) if x.shape == y.shape else float("inf") for x, y in pairs), default=0.0)


def _difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the largest difference, relative to the root mean square; NaN counts as infinite."""
    scale = y.square().mean().sqrt().clamp(min=1e-30)
    return float(((x - y).abs().max() / scale).nan_to_num(nan=float("inf"), posinf=float("inf")))


def _slack(model: torch.nn.Module) -> float:
    """Return the tolerance for rounding errors between rows of different lengths."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return 1e-4 if dtypes <= {torch.float32, torch.float64} else 5e-2


def _token(model: Any) -> int:
    """Return a token id that is not a special token in the config."""
    config = getattr(model, "config", None)
    values = vars(config).items() if config is not None else ()
    special = {value for name, value in values if name.endswith(("token_id", "token_index")) and isinstance(value, int)}
    return next(token for token in range(3, 10_000) if token not in special)

"""Compare the settings, code and packages of all ranks before the first step.

Ranks with different learning rates, seeds, layouts or code versions train without an error, to wrong weights. So each
rank describes itself as named strings, and all ranks compare a digest of them in one collective. Only if the digests
differ are the strings themselves gathered, to report each differing key with every rank's value.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from functools import cache
from glob import glob
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.collectives import gather_bytes, gather_tensors, ranks
from longctx.errors import EngineError, MeshError

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "triton", "peft")
_SHOWN = 120  # characters of a value in a message
_DIFFERENCES = 12  # keys in a message


def compare_ranks(values: Mapping[str, Any], problem: Exception | None = None) -> None:
    """Raise on every rank unless all ranks pass equal ``values``. One small collective over the world, if there is one.

    Args:
        values: what must be the same on all ranks, by name; ``flatten`` turns nested settings into this form. Values
            that are not strings are compared as JSON or, where JSON cannot hold them, as ``str``.
        problem: an error that this rank alone ran into while preparing. It is raised here, after the collective, so
            that the other ranks stop too instead of waiting.

    Raises:
        EngineError: on every rank, with each key that differs and the ranks that hold each value.
        Exception: ``problem``, on the rank that passed it.
    """
    mine = {str(key): _text(value) for key, value in values.items()}
    if problem is not None:
        mine = {_PROBLEM: f"{type(problem).__name__}: {problem}"}
    if ranks()[1] > 1 and dist.get_backend() != "fake":  # a rehearsal has no other ranks
        everyone = _gather(json.dumps(mine, sort_keys=True).encode())
        if problem is None and everyone is not None:
            raise EngineError(_differences([json.loads(text) for text in everyone]))
    if problem is not None:
        raise problem


def compare_grids(ring: int, ulysses: int, data: int) -> None:
    """Raise on every rank unless all ranks ask for the same grid; their process groups would not match. Collective.

    Raises:
        MeshError: on every rank, with the sizes that differ.
    """
    try:
        compare_ranks({"Mesh(ring=…)": ring, "Mesh(ulysses=…)": ulysses, "Mesh(data=…)": data})
    except EngineError as error:
        raise MeshError(str(error)) from None


def flatten(settings: Any, prefix: str = "") -> dict[str, str]:
    """Return nested settings by dotted name, values as JSON: ``{"a": {"b": 1}}`` becomes ``{"a.b": "1"}``."""
    if isinstance(settings, Mapping) and settings:
        flat: dict[str, str] = {}
        for key, value in settings.items():
            flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: _text(settings)}


@cache
def code_and_packages() -> dict[str, str]:
    """Return a digest of longctx's source, and the versions of Python and of the packages that training uses."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for name in sorted(glob("**/*.py", root_dir=root, recursive=True)):  # follows a checkout's links to the operators
        digest.update(name.encode() + b"\0" + (root / name).read_bytes())
    found = {"source of longctx": digest.hexdigest()[:16], "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[f"package {name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[f"package {name}"] = "not installed"
    found["byte order"] = sys.byteorder
    return found


_PROBLEM = "refused"
_PRIME = 1_000_003


def checksum(x: torch.Tensor) -> torch.Tensor:
    """Return a checksum of shape and elements, () int64 on ``x``'s device."""
    flat = x.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.double().view(torch.int64)
    index = torch.arange(1, flat.numel() + 1, device=flat.device) * _PRIME
    mixed = (flat.to(torch.int64) + 7) * (index ^ (index >> 7))  # int64 overflow wraps, which a checksum may
    return mixed.sum() + sum((axis + 2) * size for axis, size in enumerate(x.shape))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return str(value)


def _gather(text: bytes) -> list[str] | None:
    """Return every rank's text, or None if all are equal, which costs 40 bytes per rank."""
    digest = torch.frombuffer(bytearray(hashlib.sha256(text).digest()), dtype=torch.int64)
    heads = gather_tensors(torch.cat([digest, torch.tensor([len(text)])]))
    if all(torch.equal(head, heads[0]) for head in heads):
        return None
    return [row.decode() for row in gather_bytes(text, [int(head[-1]) for head in heads])]


def _differences(everyone: list[dict[str, str]]) -> str:
    """Return the message that lists each differing key, its values and the ranks that hold each."""
    refused = {rank: values[_PROBLEM] for rank, values in enumerate(everyone) if _PROBLEM in values}
    if refused:
        shown = "; ".join(f"rank {rank}: {text}" for rank, text in list(refused.items())[:3])
        return f"{ranks_text(list(refused))} refused what it was given and stops; so do all. {shown}"
    lines = []
    keys = sorted({key for values in everyone for key in values})
    for key in keys:
        holders: dict[str, list[int]] = {}
        for rank, values in enumerate(everyone):
            holders.setdefault(values.get(key, "(not given)"), []).append(rank)
        if len(holders) > 1:
            lines.append(f"{key}: " + ", ".join(f"{_short(value)} on {ranks_text(r)}" for value, r in holders.items()))
    more = f"\n  … and {len(lines) - _DIFFERENCES} more" if len(lines) > _DIFFERENCES else ""
    return (
        "the ranks do not agree on what to train; start all of them with the same settings, code and packages:\n  "
        + "\n  ".join(lines[:_DIFFERENCES])
        + more
    )


def _short(value: str) -> str:
    if len(value) <= _SHOWN:
        return value
    return f"{value[:_SHOWN]}… (sha256 {hashlib.sha256(value.encode()).hexdigest()[:8]})"


def ranks_text(ranks: list[int]) -> str:
    """Return ``rank 3`` or ``ranks 0, 1``; at most eight are listed."""
    shown = ", ".join(map(str, ranks[:8])) + (f", … ({len(ranks)} in all)" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"

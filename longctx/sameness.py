"""Compare what every rank was given, before the first step: a rank with another setting trains on without a word.

Two learning rates, seeds, layouts or versions of the code give finite losses and wrong weights. So each rank describes
itself as named strings, and all ranks compare a digest of them in one small exchange; only if the digests differ do the
strings travel, to name the key and each rank's value.
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
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from longctx.errors import EngineError, MeshError

if TYPE_CHECKING:
    from longctx.mesh import Mesh

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "triton", "peft")
_SHOWN = 120  # characters of a value in a message
_DIFFERENCES = 12  # keys in a message


def compare_ranks(values: Mapping[str, Any], mesh: Mesh, problem: Exception | None = None) -> None:
    """Raise on every rank alike unless all ranks pass equal ``values``. Collective over the world, one small exchange.

    Args:
        values: what must be the same on all ranks: name to value; ``flatten`` makes one of nested settings. Values
            that are not strings are compared as JSON, else as their ``str``.
        mesh: the grid; it need not be connected, but torch.distributed must run.
        problem: what this rank alone found wrong while it prepared. It is raised here after the exchange, so that the
            other ranks stop too instead of waiting.

    Raises:
        EngineError: on every rank, with each key that differs and the ranks that hold each value.
        Exception: ``problem``, on the rank that passed it.
    """
    mine = {str(key): _text(value) for key, value in values.items()}
    if problem is not None:
        mine = {_PROBLEM: f"{type(problem).__name__}: {problem}"}
    if mesh.world_size > 1 and dist.get_backend() != "fake":  # a rehearsal has no other ranks
        everyone = _gather(json.dumps(mine, sort_keys=True).encode(), mesh)
        if problem is None and everyone is not None:
            raise EngineError(_differences([json.loads(text) for text in everyone]))
    if problem is not None:
        raise problem


def compare_grids(mesh: Mesh) -> None:
    """Raise on every rank alike unless all ranks asked for the same grid: their groups would not fit together.

    Raises:
        MeshError: on every rank, with the sizes that differ.
    """
    sizes = {"Mesh(ring=…)": mesh.ring_size, "Mesh(ulysses=…)": mesh.ulysses_size, "Mesh(data=…)": mesh.data_size}
    try:
        compare_ranks(sizes, mesh)
    except EngineError as error:
        raise MeshError(str(error)) from None


def flatten(settings: Any, prefix: str = "") -> dict[str, str]:
    """Return nested settings as dotted names and JSON: ``{"a": {"b": 1}}`` is ``{"a.b": "1"}``."""
    if isinstance(settings, Mapping) and settings:
        flat: dict[str, str] = {}
        for key, value in settings.items():
            flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: _text(settings)}


@cache
def code_and_packages() -> dict[str, str]:
    """Return what this process runs: a digest of longctx's own source, and the versions of Python and its packages."""
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
    """Return () int64, on ``x``'s device, that differs, almost surely, when the shape or any element differs."""
    flat = x.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.double().view(torch.int64)
    index = torch.arange(1, flat.numel() + 1, device=flat.device) * _PRIME
    mixed = (flat.to(torch.int64) + 7) * (index ^ (index >> 7))  # wraps around: a checksum, not arithmetic
    return mixed.sum() + sum((place + 2) * size for place, size in enumerate(x.shape))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return str(value)


def _gather(text: bytes, mesh: Mesh) -> list[str] | None:
    """Return every rank's text, or None where all are equal, which costs 40 bytes a rank."""
    device = mesh.device
    digest = torch.frombuffer(bytearray(hashlib.sha256(text).digest()), dtype=torch.int64)
    mine = torch.cat([digest, torch.tensor([len(text)])]).to(device)
    heads = _all_gather(mine, mesh.world_size)
    if all(torch.equal(head, heads[0]) for head in heads):
        return None
    lengths = [int(head[-1]) for head in heads]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = _all_gather(padded.to(device), mesh.world_size)
    return [bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths, strict=True)]


def _all_gather(mine: torch.Tensor, world_size: int) -> list[torch.Tensor]:
    parts = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(parts, mine)
    return [part.cpu() for part in parts]


def _differences(everyone: list[dict[str, str]]) -> str:
    """Return a message with each key whose values differ, and the ranks of each value."""
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
    """Say which ranks, at most eight of them: ``rank 3``, ``ranks 0, 1``."""
    shown = ", ".join(map(str, ranks[:8])) + (f", … ({len(ranks)} in all)" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"

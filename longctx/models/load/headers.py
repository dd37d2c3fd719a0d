"""Read names, dtypes and shapes of a pretrained folder's weights from safetensors headers, without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from longctx.errors import ModelError
from longctx.models.load.settings import is_pointer, read_json

_LARGEST_HEADER = 100_000_000  # the format's own limit
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
}


class Weight(NamedTuple):
    """Header entry of one tensor."""

    dtype: str
    """as safetensors writes it: F32, BF16, …"""
    shape: tuple[int, ...]
    file: str

    @property
    def numbers(self) -> int:
        """Number of elements."""
        product = 1
        for size in self.shape:
            product *= size
        return product


def weight_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files of a pretrained folder, in order.

    Raises:
        ModelError: there are none, one is missing, a name points outside the folder, or the folder holds an adapter.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter to another model; merge them and give the merged folder")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        other = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
        also = f" ({', '.join(sorted(other)[:3])} may run code when loaded, and is not read)" if other else ""
        raise ModelError(f"{folder}: no model.safetensors, no model.safetensors.index.json{also}; save as safetensors")
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}: every file must be a .safetensors in the same folder")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing, though {index.name} names it")
    return [folder / name for name in names]


def read_weights(folder: str | Path) -> dict[str, Weight]:
    """Return every weight of a pretrained folder by name, from the headers; tensors are not read.

    Raises:
        ModelError: see ``weight_files``; or a file is a Git LFS pointer, truncated or no safetensors file, or the index
            names a weight that its file does not have.
    """
    folder = Path(folder)
    found: dict[str, Weight] = {}
    for path in weight_files(folder):
        found.update(_header(path))
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        for name, file in _weight_map(index).items():
            if name not in found or found[name].file != file:
                raise ModelError(f"{folder / file} lacks the weight {name}, which {index.name} says it holds")
    return found


def fingerprint(folder: str | Path) -> str:
    """Return a short hash of a folder's weights: of every file its size, its header, and sixteen samples of 64 KiB.

    Raises:
        ModelError: see ``weight_files``.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        size, length, header = _start(path)
        digest.update(f"{path.name} {size} ".encode() + header)
        with path.open("rb") as stream:
            for sample in range(16):
                stream.seek(8 + length + (size - 8 - length) * sample // 16)
                digest.update(stream.read(2**16))
    return digest.hexdigest()[:16]


def _weight_map(index: Path) -> dict[str, Any]:
    content = read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ModelError(f"{index} is no index of safetensors files: it has no weight_map of names")
    return found


def _header(path: Path) -> dict[str, Weight]:
    """Read one file's header: 8 bytes with the length of the JSON, then the JSON."""
    size, length, raw = _start(path)
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is no safetensors file: its header is not JSON; copy it again") from None
    try:
        weights = dict(_entries(entries, path.name))
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise ModelError(f"{path} is no safetensors file: its header is damaged; copy it again") from None
    if size != 8 + length + end:
        raise ModelError(f"{path} has {size:,} bytes, but its header describes {8 + length + end:,}; copy it again")
    return weights


def _start(path: Path) -> tuple[int, int, bytes]:
    """Return (file size, header length, header)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(64)
            length = int.from_bytes(start[:8], "little")
            if is_pointer(start):
                raise ModelError(f"{path} is a Git LFS pointer, not the weights; fetch them: git lfs pull")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise ModelError(f"{path} is truncated or no safetensors file ({size:,} bytes); copy it again")
            stream.seek(8)
            return size, length, stream.read(length)
    except OSError as problem:
        raise ModelError(f"{path} cannot be read: {problem.strerror}") from None


def _entries(entries: dict[str, Any], file: str) -> Iterator[tuple[str, Weight]]:
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        weight = Weight(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), file)
        first, last = entry["data_offsets"]
        bits = _BITS.get(weight.dtype)
        if bits is not None and last - first != weight.numbers * bits // 8:
            raise ValueError(name)
        yield name, weight

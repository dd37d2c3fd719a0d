"""Read the config.json of a pretrained folder as plain data: no torch, no transformers, size limits, no code executed.

Every reader of such a folder (``check``, the planner, the loader) uses it, so that all agree.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from longctx.errors import ModelError

REFUSED = {
    "auto_map": "names Python code to run; convert the model to an architecture of transformers",
    "custom_pipelines": "names Python code to run",
    "trust_remote_code": "asks for code to be run",
    "attn_implementation": "chooses an attention implementation, which longctx must choose",
    "experts_implementation": "chooses an implementation that may be downloaded",
    "kernel_config": "names kernels to download",
    "quantization_config": "quantised weights cannot be trained here; give the original weights",
    "backbone": "names a model to download; give its configuration as backbone_config",
    "configuration_files": "points to other configuration files; keep the one for this transformers as config.json",
}
_IMPLEMENTATION = re.compile(r"^_(attn|attention|experts|kernel).*")  # the field of CVE-2026-4372, and similar ones
_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_FILE = 64 * 2**20
# Config classes build lists with one entry per layer, expert or label; a model allocates one row per vocabulary entry.
_BOUNDS = (
    (re.compile(r"layers?$|^n_layers?$|^depth$|^num_blocks$"), 4096),
    (re.compile(r"experts"), 2**16),
    (re.compile(r"heads|^n_head$"), 2**14),
    (re.compile(r"vocab_size$"), 2**24),
    (re.compile(r"^num_labels$"), 2**20),
    (re.compile(r"^(hidden_size|n_embd|d_model|head_dim)$"), 2**20),
    (re.compile(r"(intermediate_size|^n_inner|^d_ff|ffn_dim)$"), 2**22),
    (re.compile(r"position"), 2**32),
)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return the config.json of a local pretrained folder; keys that lead to code or to a download are rejected.

    Raises:
        ModelError: no such folder or file, no JSON object, a rejected key, or an implausible size.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json there; give a local folder that save_pretrained wrote")
    found = read_json(path)
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds {type(found).__name__}, not an object")
    _refuse_keys(found, str(path))
    _require_bounds(found, str(path))
    return found


def read_json(path: Path, largest: int = _LARGEST_FILE) -> Any:
    """Return the content of a JSON file.

    Raises:
        ModelError: it cannot be read, is a Git LFS pointer, longer than ``largest`` bytes, or not JSON.
    """
    try:
        size = path.stat().st_size
        if size > largest:
            raise ModelError(f"{path} has {size:,} bytes, more than the {largest:,} that are read; it is no such file")
        raw = path.read_bytes()
    except OSError as problem:
        raise ModelError(f"{path} cannot be read: {problem.strerror}") from None
    if is_pointer(raw):
        raise ModelError(f"{path} is a Git LFS pointer, not the file itself; fetch the files: git lfs pull")
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        raise ModelError(f"{path} is not valid JSON: {str(problem) or 'nested too deeply'}") from None


def is_pointer(start: bytes) -> bool:
    """Return whether a file that starts with ``head`` is a Git LFS pointer: a placeholder for a file not fetched."""
    return start.startswith(_POINTER)


def text_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that describes the language model: all of it, or its ``text_config``."""
    for name in ("text_config", "thinker_config", "llm_config", "language_config", "decoder"):
        inner = settings.get(name)
        if isinstance(inner, dict) and "vocab_size" not in settings:
            return text_settings(inner)
    return settings


def whole_number(settings: dict[str, Any], *names: str) -> int | None:
    """Return the first of ``names`` that is a whole number of at least 1, or None."""
    for name in names:
        value = settings.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
    return None


def _refuse_keys(found: dict[str, Any], where: str) -> None:
    """Reject keys that lead to code or downloads, at any depth."""
    for key, value in found.items():
        if key in REFUSED and value not in (None, False):
            raise ModelError(f"{where}: {key!r} {REFUSED[key]}")
        if _IMPLEMENTATION.search(key):
            raise ModelError(
                f"{where}: private key {key!r} chooses an implementation, which may be downloaded; remove it"
            )
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                _refuse_keys(inner, where)


def _require_bounds(found: dict[str, Any], where: str) -> None:
    """Reject sizes for which building the config alone would exhaust memory, at any depth."""
    for key, value in found.items():
        if isinstance(value, dict):
            _require_bounds(value, where)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = next((most for pattern, most in _BOUNDS if pattern.search(key)), None)
            if most is not None and value > most:
                raise ModelError(f"{where}: {key} is {value}, above {most}, which no model has; correct the file")

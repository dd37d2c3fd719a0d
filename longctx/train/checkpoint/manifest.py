"""The manifest of a checkpoint: names, sizes and hashes of its files, and facts about the run that saved it.

longctx ignores a folder without a valid manifest. The text is canonical JSON with its own hash, so a flipped bit is
detected in the manifest too. The format is fixed: readers reject an unknown ``schema``, and new facts go into ``run``
or ``versions``, which readers must not require to be complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from longctx.errors import CheckpointError
from longctx.train.durable import sha256_of, write_atomically

NAME = "manifest.json"
FORMAT = "longctx-checkpoint"
SCHEMA = 1
STAGE_BEGIN = "stage_begin"  # in `run`, of runs with stages
MAX_BYTES = 64 * 2**20  # a manifest lists files; one of this size is not a manifest


@dataclass(frozen=True)
class Progress:
    """The position of a run: optimizer steps taken, packed rows and valid tokens consumed."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    stage_begin: int = 0  # samples consumed before the current stage: its rows are numbered from 0


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: path inside its folder, length, SHA-256, and the rank that wrote it."""

    path: str
    bytes: int
    sha256: str
    rank: int


@dataclass(frozen=True)
class Manifest:
    """Everything that a reader needs before it opens the other files of the checkpoint.

    Attributes:
        step: optimizer steps taken.
        samples: packed rows consumed since the start of the run; with ``seed`` it determines the data position.
        seed: of the sample order.
        tokens: valid tokens consumed since the start of the run.
        world: sizes of the grid: ``size``, ``data``, ``ring``, ``ulysses``.
        layout: how sequences were sharded over the ring.
        zero_stage: DeepSpeed's ZeRO stage.
        config_sha256: of the resolved configuration.
        git_commit: of the checkout, or None outside one.
        versions: of longctx, python, torch, deepspeed, transformers, numpy.
        run: other facts of the run (threads, precision, data hashes, …).
        files: every file, sorted by path; the manifest itself is not listed.
    """

    step: int
    samples: int
    seed: int
    tokens: int
    world: dict[str, int]
    layout: str
    zero_stage: int
    config_sha256: str
    git_commit: str | None
    versions: dict[str, str]
    run: dict[str, Any] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()

    @property
    def progress(self) -> Progress:
        """The position of the run when it saved this checkpoint."""
        begin = self.run.get(STAGE_BEGIN, 0)
        return Progress(self.step, self.samples, self.tokens, begin if isinstance(begin, int) else 0)

    @property
    def total_bytes(self) -> int:
        """Total size of all files, in bytes."""
        return sum(entry.bytes for entry in self.files)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into ``folder`` durably. Call it last: it declares the other files complete."""
    write_atomically(folder / NAME, _render(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json`` itself, but not the files it lists.

    Raises:
        CheckpointError: it is missing, unreadable, altered, of an unknown schema, or lists a path outside the folder.
    """
    path = folder / NAME
    try:
        if path.is_symlink() or path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: not a manifest (a link, or larger than {MAX_BYTES} bytes)")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} is not a checkpoint: cannot read {NAME} ({error.strerror})") from None
    try:
        document = json.loads(text)
        body = document["manifest"]
        known = body["format"] == FORMAT and body["schema"] == SCHEMA
        if not isinstance(body, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: damaged, it is not the JSON that longctx writes") from None
    if not known:
        raise CheckpointError(
            f"{path}: format {body.get('format')!r} schema {body.get('schema')!r}; this longctx reads "
            f"{FORMAT!r} schema {SCHEMA}"
        )
    try:
        manifest = _parse(body)
        altered = _render(manifest).encode() != text
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: damaged, a field is missing or of the wrong type") from None
    if altered:
        raise CheckpointError(f"{path}: damaged, its contents do not match the hash it carries")
    for entry in manifest.files:
        _require_plain_path(path, entry.path)
    return manifest


def verify_files(folder: Path, manifest: Manifest, hash_ranks: Collection[int] | None = None) -> None:
    """Check that the folder holds exactly the listed files, with the listed sizes and, for chosen ones, hashes.

    Args:
        folder: the checkpoint.
        manifest: the expected contents.
        hash_ranks: hash only the files written by these ranks; None hashes all.

    Raises:
        CheckpointError: a file is missing, unlisted, a link, of another size, or altered; the message names it.
    """
    listed = {entry.path for entry in manifest.files} | {NAME}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise CheckpointError(f"{path}: a symbolic link inside a checkpoint; it is refused")
        if path.is_file() and name not in listed:
            raise CheckpointError(f"{path}: this file is not in the manifest; remove it from the checkpoint")
    for entry in manifest.files:
        path = folder / entry.path
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but the manifest lists it")
        size = path.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(f"{path}: {size} bytes, but {entry.bytes} were saved")
    for entry in manifest.files:
        if (hash_ranks is None or entry.rank in hash_ranks) and sha256_of(folder / entry.path) != entry.sha256:
            raise CheckpointError(f"{folder / entry.path}: altered since it was saved (its SHA-256 differs)")


def _render(manifest: Manifest) -> str:
    """Return the canonical text of a manifest: sorted keys, fixed spacing, its own hash at the end."""
    body = {"format": FORMAT, "schema": SCHEMA, **asdict(manifest)}
    text = json.dumps(body, sort_keys=True, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"manifest": {text},\n"sha256": "{digest}"}}\n'


def _parse(body: dict[str, Any]) -> Manifest:
    """Parse a manifest.

    Raises:
        TypeError, ValueError, KeyError: a field is missing, unknown or of the wrong type.
    """
    fields = {key: value for key, value in body.items() if key not in ("format", "schema")}
    if not isinstance(fields["files"], list):
        raise TypeError("files is not a list")
    entries = tuple(FileEntry(**entry) for entry in fields.pop("files"))
    manifest = Manifest(**fields, files=entries)
    _require_types(manifest)
    counts = (manifest.step, manifest.samples, manifest.tokens, *(entry.bytes for entry in entries))
    ranks = [entry.rank for entry in entries]
    if any(type(value) is not int or value < 0 for value in (*counts, *ranks, *manifest.world.values())):
        raise ValueError("a count is not a non-negative integer")
    if len({entry.path for entry in entries}) != len(entries):
        raise ValueError("a file is listed twice")
    return manifest


def _require_types(manifest: Manifest) -> None:
    """Reject values of wrong types, on which readers would fail later; `_parse` checks the counts."""
    texts = [manifest.layout, manifest.config_sha256, *manifest.versions, *manifest.versions.values()]
    texts += [text for entry in manifest.files for text in (entry.path, entry.sha256)]
    texts += [] if manifest.git_commit is None else [manifest.git_commit]
    if not all(isinstance(value, dict) for value in (manifest.world, manifest.versions, manifest.run)):
        raise TypeError("a block is not an object")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a string field is not a string")
    if any(type(value) is not int for value in (manifest.seed, manifest.zero_stage)) or "size" not in manifest.world:
        raise TypeError("an integer field is not an integer")
    settings = manifest.run.get("settings", {})
    if not isinstance(settings, dict):
        raise TypeError("settings is not an object")


def _require_plain_path(manifest: Path, name: str) -> None:
    """Reject a path that leads out of the checkpoint's folder."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or any(part in ("..", "") for part in parts) or "\0" in name:
        raise CheckpointError(f"{manifest}: lists {name!r}, which is outside the checkpoint; it is refused")

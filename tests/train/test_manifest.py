"""The manifest finds every kind of damage and refuses names that leave its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import CheckpointError
from longctx.train import durable
from longctx.train.checkpoint import manifest
from longctx.train.checkpoint.manifest import FileEntry, Manifest

FACTS = Manifest(
    step=20,
    samples=80,
    seed=3,
    tokens=655360,
    world={"size": 2, "data": 1, "ring": 2, "ulysses": 1},
    layout="zigzag",
    zero_stage=3,
    config_sha256="0" * 64,
    git_commit=None,
    versions={"torch": "2.13.0"},
    run={"threads": 1},
)


def make(folder: Path, files: dict[str, bytes]) -> Manifest:
    entries = []
    for rank, (name, data) in enumerate(sorted(files.items())):
        (folder / name).write_bytes(data)
        entries.append(FileEntry(name, len(data), durable.sha256_of(folder / name), rank))
    whole = dataclasses.replace(FACTS, files=tuple(entries))
    manifest.write_manifest(folder, whole)
    return whole


def check(folder: Path) -> None:
    manifest.verify_files(folder, manifest.read_manifest(folder))


def test_what_is_written_is_read_and_verifies(tmp_path: Path) -> None:
    written = make(tmp_path, {"a.pt": b"weights", "rng.json": b"{}"})
    assert manifest.read_manifest(tmp_path) == written
    assert written.total_bytes == 9
    check(tmp_path)


def test_one_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    make(tmp_path, {"a.pt": bytes(range(200)), "b.pt": b"\0" * 100})
    chance = random.Random(0)
    for path in sorted(tmp_path.iterdir()):
        original = path.read_bytes()
        for _ in range(70):
            damaged = bytearray(original)
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=path.name):
                check(tmp_path)
        path.write_bytes(original)
    check(tmp_path)


def test_truncated_empty_missing_extra_and_swapped_files_are_named(tmp_path: Path) -> None:
    make(tmp_path, {"a.pt": b"first", "b.pt": b"other"})
    originals = {path: path.read_bytes() for path in tmp_path.iterdir()}
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"

    def restore() -> None:
        for path in tmp_path.iterdir():
            path.unlink()
        for path, data in originals.items():
            path.write_bytes(data)

    def swap() -> None:
        a.write_bytes(originals[b])
        b.write_bytes(originals[a])

    damages = [
        (lambda: a.write_bytes(b"fir"), "a.pt: 3 bytes, but 5"),
        (lambda: a.write_bytes(b""), "a.pt: 0 bytes"),
        (lambda: b.unlink(), "b.pt: missing"),
        (lambda: (tmp_path / "evil.pt").write_bytes(b""), "evil.pt: this file is not in the manifest"),
        (swap, "a.pt: altered"),
        (lambda: (b.unlink(), b.symlink_to(a)), "symbolic link"),
        (lambda: (tmp_path / manifest.NAME).unlink(), "not a checkpoint"),
        (lambda: (tmp_path / manifest.NAME).write_bytes(b""), "damaged"),
    ]
    for damage, message in damages:
        damage()
        with pytest.raises(CheckpointError, match=message):
            check(tmp_path)
        restore()
    check(tmp_path)


@pytest.mark.parametrize("name", ["../a.pt", "/etc/passwd", "x/../../a", "", "a\0b"])
def test_names_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    manifest.write_manifest(tmp_path, dataclasses.replace(FACTS, files=(FileEntry(name, 1, "0" * 64, 0),)))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        manifest.read_manifest(tmp_path)


def test_an_unknown_schema_is_named(tmp_path: Path) -> None:
    make(tmp_path, {"a.pt": b"x"})
    document = json.loads((tmp_path / manifest.NAME).read_text())
    document["manifest"]["schema"] = 99
    (tmp_path / manifest.NAME).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="schema 99"):
        manifest.read_manifest(tmp_path)


@given(
    st.one_of(
        st.binary(max_size=300),
        st.recursive(st.integers() | st.text() | st.none(), st.lists).map(
            lambda value: json.dumps({"manifest": value, "sha256": ""}).encode()
        ),
    )
)
def test_any_other_content_is_a_named_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / manifest.NAME).write_bytes(data)
    with pytest.raises(CheckpointError):
        manifest.read_manifest(folder)


def with_value(folder: Path, path: tuple[str | int, ...], value: object) -> None:
    """Write a manifest whose own hash is right and in which one value is another."""
    body: Any = {"format": manifest.FORMAT, "schema": manifest.SCHEMA, **dataclasses.asdict(FACTS)}
    body["files"] = [{"path": "a.pt", "bytes": 1, "sha256": "0" * 64, "rank": 0}]
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    text = json.dumps(body, sort_keys=True, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / manifest.NAME).write_text(f'{{"manifest": {text},\n"sha256": "{digest}"}}\n')


PLACES = (
    *((name,) for name in ("step", "samples", "seed", "tokens", "world", "layout", "zero_stage", "config_sha256")),
    *((name,) for name in ("git_commit", "versions", "run", "files")),
    *(("files", 0, name) for name in ("path", "bytes", "sha256", "rank")),
    *(("files", 0), ("world", "size"), ("versions", "torch"), ("run", "settings")),
)


@pytest.mark.parametrize("place", PLACES)
def test_a_value_of_a_wrong_type_is_a_named_error(tmp_path: Path, place: tuple[str | int, ...]) -> None:
    with_value(tmp_path, ("run", "more"), [1, None])  # what is not known yet may be anything
    manifest.read_manifest(tmp_path)
    for value in ([1], {"a": [2]}, 1.5, True, -1, "x", None):
        right_type = {
            "layout": str, "config_sha256": str, "git_commit": str | None, "path": str, "sha256": str, "torch": str,
            "run": dict, "settings": dict,
        }.get(str(place[-1]))  # fmt: skip
        if value == -1 and place[-1] in ("seed", "zero_stage") or (right_type and isinstance(value, right_type)):
            continue
        with_value(tmp_path, place, value)
        with pytest.raises(CheckpointError, match=manifest.NAME):
            manifest.read_manifest(tmp_path)

"""Folders: every file is read, or is an error, or is listed with its reason; what longctx writes never becomes text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longctx.data.build import build_tokens
from longctx.data.sources.document import LeftOut
from longctx.data.sources.folder import walk, would_read
from longctx.data.sources.text import open_source
from longctx.errors import DataError


def names(folder: Path, *exclude: str) -> tuple[list[str], dict[str, LeftOut]]:
    left_out: dict[str, LeftOut] = {}
    return [path.relative_to(folder).as_posix() for path in walk(folder, exclude, left_out)], left_out


def test_links_are_followed_and_every_folder_is_read_once(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in (root / "real" / "a.txt", outside / "deep" / "b.txt"):
        path.parent.mkdir(parents=True)
        path.write_text("text")
    (root / "again").symlink_to(root / "real")
    (root / "loop").symlink_to(root)
    (root / "data").symlink_to(outside)
    (outside / "back").symlink_to(root)
    assert names(root)[0] == ["data/deep/b.txt", "real/a.txt"]


def test_what_vanished_or_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    link = tmp_path / "b.txt"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="b.txt: a broken link"):
        walk(tmp_path)
    link.unlink()
    (tmp_path / "closed").mkdir()
    listed = os.listdir

    def refuse(path: Path) -> list[str]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match="closed cannot be read: Permission denied"):
        walk(tmp_path)


def test_what_is_left_out_is_listed_with_its_size(tmp_path: Path) -> None:
    for name in (".git/objects/x", ".hidden", "a.txt", "old/b.txt", "old/c.txt", "d.bin", "e/f.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.txt").touch()
    found, left_out = names(tmp_path, "old/", "*.bin")
    assert found == ["a.txt", "empty.txt"]
    assert left_out == {
        ".git": ("hidden", 1, 14),
        ".hidden": ("hidden", 1, 7),
        "old": ("named by data.exclude", 2, 18),
        "d.bin": ("named by data.exclude", 1, 5),
        "e/f.bin": ("named by data.exclude", 1, 7),
        "pipe": ("neither a file nor a folder", 1, 0),
    }
    built = build_tokens(tmp_path, "bytes", tmp_path.with_name("out"), exclude=["old/", "*.bin"])
    report = built.report
    assert (report["skipped_files"], report["skipped_bytes"], report["formats"]) == (8, 51, {"text": 1})
    by_reason = {left["why"]: (left["files"], left["bytes"], left["first"]) for left in report["skipped"]}
    assert by_reason["named by data.exclude"] == (4, 30, ["d.bin", "e/f.bin", "old"])
    assert by_reason["empty"] == (1, 0, ["empty.txt"]) and sum(left["files"] for left in report["skipped"]) == 8
    with pytest.raises(DataError, match="holds no files but what is left out .2 hidden, 7 named"):
        open_source(tmp_path, exclude=["[a-z]*"])


def test_what_longctx_writes_never_becomes_text(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("some text\n" * 20)
    with pytest.raises(DataError, match="inside the source .*token files would become text"):
        build_tokens(text, "bytes", text / "runs" / "tokens")
    build_tokens(text, "bytes", text / ".runs" / "tokens")  # hidden: never read
    build_tokens(text, "bytes", text / "runs" / "tokens", exclude=["runs"])
    for source in (text, text / "runs" / "tokens"):
        with pytest.raises(DataError, match="holds token files that `longctx data build` made.*only source"):
            build_tokens(source, "bytes", tmp_path / "out")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        (run / name).write_text("{}")
    with pytest.raises(DataError, match="holds the output folder of a run"):
        build_tokens(run, "bytes", tmp_path / "out")


def test_would_read_goes_by_real_places(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    assert would_read(tmp_path / "a", tmp_path / "link" / "new" / "tokens")
    assert would_read(tmp_path / "link", tmp_path / "a")
    assert not would_read(tmp_path / "a", tmp_path / "ab") and not would_read("python-stdlib", tmp_path)
    assert not would_read(tmp_path, tmp_path / "a" / "b", ["a/*"]) and not would_read(tmp_path, tmp_path / ".x" / "y")

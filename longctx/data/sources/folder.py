"""List the files of a folder; hidden files, empty files and excluded patterns are left out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from longctx.data.sources.document import LeftOut
from longctx.errors import DataError

HIDDEN, EMPTY, NAMED = "hidden", "empty", "named by data.exclude"
# Files that together identify a folder that longctx wrote: its output must not become training text.
_OWN = (
    (("environment.json", "config.yaml"), "the output folder of a run", "give only the folders of your own text"),
    (("build.json", "train.tokens"), "token files that `longctx data build` made", "give it as the only source"),
)


def walk(folder: Path, exclude: Sequence[str] = (), left_out: dict[str, LeftOut] | None = None) -> list[Path]:
    """Return all visible files below ``folder``, sorted by path. Links are followed; every folder is read once.

    Args:
        exclude: patterns as in a shell (``*`` also matches ``/``) of paths relative to ``folder``, or of names.
        left_out: filled with the files left out, by path relative to ``folder``; None: not recorded.

    Raises:
        DataError: a folder that cannot be read, a broken link, or a folder that longctx itself wrote.
    """
    found: list[Path] = []
    seen: set[str] = set()
    links = [folder]
    while links:  # first the files below the folder, then the targets of links
        start = links.pop(0)
        found += _below(start, folder, exclude, left_out, seen, links)
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def would_read(source: str | Path, path: Path, exclude: Sequence[str] = ()) -> bool:
    """Return whether ``walk`` of a source folder would reach ``path``, now or once it exists."""
    folder = Path(source).expanduser()
    if str(source).startswith("hf:") or not folder.is_dir():
        return False
    real, inside = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if not real.is_relative_to(inside):
        return False
    parts = real.relative_to(inside).parts
    prefixes = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    return not any(part.startswith(".") for part in parts) and not any(_matches(path, exclude) for path in prefixes)


def _below(
    start: Path,
    root: Path,
    exclude: Sequence[str],
    left_out: dict[str, LeftOut] | None,
    seen: set[str],
    links: list[Path],
) -> Iterator[Path]:
    real = os.path.realpath(start)
    if real in seen:
        return
    seen.add(real)
    names = _names(start)
    for marks, what, fix in _OWN:
        if set(marks) <= set(names):
            raise DataError(f"{start}: this folder holds {what}, which would become text to train on; {fix}")
    for name in names:
        path = start / name
        relative = path.relative_to(root).as_posix()
        why = HIDDEN if name.startswith(".") else NAMED if _matches(relative, exclude) else None
        if why is not None:
            if left_out is not None:
                left_out[relative] = LeftOut(why, *_size(path))
        elif path.is_dir():
            if path.is_symlink():
                links.append(path)
            else:
                yield from _below(path, root, exclude, left_out, seen, links)
        elif path.is_file():
            yield path
        elif path.is_symlink():
            raise DataError(f"{path}: a broken link ({os.readlink(path)}); restore its target, or remove it")
        elif left_out is not None:
            left_out[relative] = LeftOut("neither a file nor a folder", 1, 0)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}; change its permissions, or leave it out") from None


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    name = relative.rpartition("/")[2]
    return any(fnmatchcase(relative, pattern.rstrip("/")) or fnmatchcase(name, pattern) for pattern in patterns)


def _size(path: Path) -> tuple[int, int]:
    """Return the number of files at or below ``path``, and their bytes; unreadable files count 0 bytes."""
    if path.is_symlink() or not path.is_dir():
        return 1, path.lstat().st_size
    files = total = 0
    for base, _, names in os.walk(path):
        for name in names:
            files += 1
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except OSError:
                continue
    return files, total

"""A lock that allows one build at a time in a folder of token files."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longctx.data.tokens.record import RECORD
from longctx.data.tokens.writer import disk_errors


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the build lock of a folder; the operating system releases it when the process ends.

    Yields whether the folder is writable. A read-only folder is allowed as long as it holds a build.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not (folder / RECORD).is_file():
            with disk_errors(folder):
                raise
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(descriptor)

"""A lock that allows one run per folder, names its holder, and is released when the holder's process ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from longctx.errors import CheckpointError

NAME = ".lock"


class FolderLock:
    """Hold ``folder/.lock`` while a run writes there. The kernel releases it when the process ends, however it ends.

    Raises:
        CheckpointError: another process holds it; the message names its host and process id.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise CheckpointError(f"{self.path.parent} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                self._refuse()
            self._refuse_living_holder()  # the file system has no locks: rely on the process id in the file
        # the contents only inform the user; the file itself stays, since deleting a lock file would let two runs lock
        # two different files of one name
        os.ftruncate(self._descriptor, 0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _holder(self) -> dict[str, object]:
        assert self._descriptor is not None
        try:
            found = json.loads(os.pread(self._descriptor, 4096, 0) or b"{}")
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    def _refuse_living_holder(self) -> None:
        holder = self._holder()
        pid = holder.get("pid")
        if holder.get("host") == socket.gethostname() and isinstance(pid, int) and not Path(f"/proc/{pid}").exists():
            return
        if holder:
            self._refuse()

    def _refuse(self) -> None:
        holder = self._holder()
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None
        raise CheckpointError(
            f"{self.path.parent} is in use by another run (process {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')}, since {holder.get('since', '?')}); wait for it, or choose another "
            "output.folder"
        )


def require_free(folder: Path) -> None:
    """Raise if a run is active in ``folder``. An early check by launchers; rank 0 takes the lock itself later.

    Raises:
        CheckpointError: another process holds the lock; the message names its host and process id.
    """
    if (folder / NAME).is_file():
        with FolderLock(folder):
            pass

"""The job spec: the private file by which values reach the ranks of other hosts, instead of arguments.

It lies in the run directory, which all hosts share, readable by its owner alone. A rank's command line holds its path
and nothing else, so no value passes a shell, a process list or a log.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import NamedTuple

from longctx.errors import LaunchError

FOLDER, NAME, CONFIG = "launch", "ticket.json", "config.yaml"
LONGEST = 2**24


class JobSpec(NamedTuple):
    """What an agent needs to know."""

    address: str
    """where the launcher listens"""
    port: int
    token: str
    """proves to the launcher that an agent is its own"""
    hosts: tuple[tuple[str, int], ...]
    """(name, ranks) in the order of the ranks"""
    folder: str
    """working directory"""
    output: str
    """the run directory"""
    config: str
    config_sha256: str
    environment: dict[str, str]
    interface: str
    python: str
    python_path: str
    silence_seconds: int
    columns: int
    """width of the terminal that shows progress; 0 where it is none"""
    command: tuple[str, ...]
    """what a rank runs"""

    @property
    def world(self) -> int:
        """Ranks in all."""
        return sum(count for _, count in self.hosts)

    def seat(self, rank: int) -> tuple[str, int, int]:
        """Return (host, local rank, ranks on that host) of ``rank``."""
        first = 0
        for name, count in self.hosts:
            if rank < first + count:
                return name, rank - first, count
            first += count
        raise LaunchError(f"rank {rank} is outside a world of {self.world} ranks")


def make_private(folder: Path) -> None:
    """Make ``folder`` for its owner alone.

    Raises:
        LaunchError: it cannot be made, or belongs to somebody else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            raise LaunchError(f"{folder} is not a folder of yours; choose another output.folder")
        folder.chmod(0o700)
    except OSError as error:
        raise LaunchError(f"{folder} cannot be made: {error.strerror}; choose another output.folder") from None


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner can read; one that is already there is replaced, never opened."""
    try:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise LaunchError(f"{path} cannot be written: {error.strerror}; choose another output.folder") from None


def save(spec: JobSpec, path: Path) -> None:
    """Write the job spec to ``path``."""
    write_private(path, json.dumps(spec._asdict()))


def load(path: Path) -> JobSpec:
    """Read a job spec that belongs to this user and that nobody else can read or replace.

    Raises:
        LaunchError: there is none here (the folder is not shared with this host), or it is not private.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as handle:
            facts = os.fstat(handle.fileno())
            if facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o077:
                raise LaunchError(f"{path} is not private to this user; it is not read")
            values = json.loads(handle.read(LONGEST))
        hosts = tuple((str(name), int(count)) for name, count in values.pop("hosts"))
        return JobSpec(hosts=hosts, command=tuple(values.pop("command")), **values)
    except FileNotFoundError:
        raise LaunchError(
            f"{path} is not on this host: output.folder must be on storage that all hosts share"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LaunchError(f"{path} cannot be read on this host: {error}") from None


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file as this host sees it; empty if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""

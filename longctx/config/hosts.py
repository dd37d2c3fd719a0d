"""Parse host names, interface names and hostfiles. Text only: no file is read, no name is resolved.

A valid name is safe as an argument of any program: it is no option, and has no special meaning to a shell, ssh or pdsh.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from longctx.errors import LaunchError

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?", re.ASCII)
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
_SLOTS = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
_INTERFACE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,14})", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\*?", re.ASCII)
_OPTION = re.compile(r"([A-Za-z]{2,40})=([A-Za-z0-9_@%:,./~+-]{1,500})", re.ASCII)
MOST_HOSTS = 100_000

# All other options can run a command, open a tunnel, or turn off what we rely on.
SSH_OPTIONS = frozenset(
    "addressfamily ciphers compression connectionattempts connecttimeout globalknownhostsfile hostkeyalgorithms "
    "identitiesonly identityfile kexalgorithms loglevel macs preferredauthentications proxyjump stricthostkeychecking "
    "user userknownhostsfile".split()
)


class Host(NamedTuple):
    """One machine, optionally with a login user, and its number of ranks (None: not given)."""

    name: str
    slots: int | None = None


def parse_host(text: str) -> Host:
    """Parse ``name`` or ``user@name``, either with an optional ``:ranks``.

    Raises:
        LaunchError: the host name or the number of ranks is invalid.
    """
    name, colon, slots = text.partition(":")
    user, at, _ = name.rpartition("@")
    if not _NAME.fullmatch(bare(name)) or (at and not _USER.fullmatch(user)):
        raise LaunchError(
            f"{text[:80]!r} is not a host; write a name of letters, digits, dots, dashes and underscores, name:4, or "
            "user@name:4"
        )
    if colon and not _SLOTS.fullmatch(slots):
        raise LaunchError(f"{text[:80]!r}: {slots[:20]!r} is not a number of ranks; write for example {name}:4")
    return Host(name, int(slots) if colon else None)


def bare(name: str) -> str:
    """Return a host's name without its login user."""
    return name.rpartition("@")[2]


def parse_hostfile(text: str) -> tuple[Host, ...]:
    """Parse a hostfile: ``name`` or ``name slots=4`` per line, comments after ``#``, an optional BOM.

    Raises:
        LaunchError: a line has another form; the message gives its number.
    """
    hosts = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, *rest = words
        slots = rest[0].removeprefix("slots=") if len(rest) == 1 and rest[0].startswith("slots=") else None
        if ":" in name or len(rest) > 1 or (rest and slots is None):
            raise LaunchError(f"line {number}: {line.strip()[:80]!r}; a line is `name slots=4`")
        try:
            hosts.append(parse_host(name if slots is None else f"{name}:{slots}"))
        except LaunchError as error:
            raise LaunchError(f"line {number}: {error}") from None
    return once_each(hosts)


def require_users(hosts: Iterable[Host], launcher: str) -> None:
    """Raise LaunchError if a host names a login user and the launcher does not support one per host."""
    named = next((host.name for host in hosts if "@" in host.name), None)
    if named is not None and launcher not in ("deepspeed", "local"):
        raise LaunchError(
            f"{named} names a user, which only launcher deepspeed supports per host; write {bare(named)}, and "
            f"launch.ssh_options: [User={named.rpartition('@')[0]}] for all hosts (openmpi, mpich)"
        )


def once_each(hosts: list[Host]) -> tuple[Host, ...]:
    """Return the hosts as a tuple; raise LaunchError if there are none, too many, or one twice."""
    if not hosts:
        raise LaunchError("no host is named; write one per line: `name slots=4`")
    if len(hosts) > MOST_HOSTS:
        raise LaunchError(f"{len(hosts):,} hosts are more than {MOST_HOSTS:,}")
    seen: set[str] = set()
    for host in hosts:
        if bare(host.name).lower() in seen:
            raise LaunchError(f"{bare(host.name)} is named twice; write it once, with all its ranks")
        seen.add(bare(host.name).lower())
    return tuple(hosts)


def is_interface(name: str) -> bool:
    """Say whether ``name`` is a valid name of a network interface."""
    return bool(_INTERFACE.fullmatch(name))


def is_variable(name: str) -> bool:
    """Say whether ``name`` is a valid name of an environment variable, or a prefix of some (``NCCL_*``)."""
    return bool(_VARIABLE.fullmatch(name))


def ssh_option(text: str) -> str | None:
    """Return what is wrong with an ssh option, or None."""
    match = _OPTION.fullmatch(text)
    if not match:
        return "is not Name=value without spaces"
    if match[1].lower() not in SSH_OPTIONS:
        return f"{match[1]} is not one of {', '.join(sorted(SSH_OPTIONS))}"
    return None

"""What the environment of a rank is made of: what its host says, what travels by the allow-list, and what we set.

Nothing else reaches a rank, so a token in the shell that starts a job stays there unless the YAML names it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Mapping

_HOST = (
    "CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES HOME LANG LD_LIBRARY_PATH LOGNAME PATH SHELL TMPDIR "
    "TZ USER XDG_CACHE_HOME SLURM_JOB_ID"
).split()
# Chosen by each host or each rank, so another machine's value would be wrong.
_NEVER = {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"}


def travelling(environment: Mapping[str, str], allowed: Iterable[str]) -> dict[str, str]:
    """Return the variables of ``environment`` whose names are on the list; ``NCCL_*`` means every such beginning."""
    patterns = tuple(allowed)
    exact = {name for name in patterns if not name.endswith("*")}
    beginnings = tuple(name[:-1] for name in patterns if name.endswith("*"))
    found = {
        name: value
        for name, value in environment.items()
        if name not in _NEVER and (name in exact or (bool(beginnings) and name.startswith(beginnings)))
    }
    return dict(sorted(found.items()))


def of_this_host() -> dict[str, str]:
    """Return the variables that a rank takes from the host it runs on."""
    return {name: os.environ[name] for name in _HOST if name in os.environ}


def address_towards(peer: str) -> str:
    """Return this host's own address on the way to ``peer``. Nothing is sent.

    Raises:
        OSError: there is no such host, or no way to it.
    """
    family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def address_of(interface: str) -> str | None:
    """Return the IPv4 address of a network interface of this host; None where it has none."""
    get_interface_address = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), get_interface_address, packed)[20:24])
        except OSError:
            return None


def interface_with(address: str) -> str | None:
    """Return the name of this host's interface that has ``address``; None if none has."""
    return next((name for _, name in socket.if_nameindex() if address_of(name) == address), None)


def sockets(interface: str) -> dict[str, str]:
    """Return the variables that bind gloo, NCCL and TensorPipe to one interface."""
    return {f"{transport}_SOCKET_IFNAME": interface for transport in ("GLOO", "NCCL", "TP")}

"""Find the address and the interface of this host that lead to another host. Sends nothing; without torch."""

from __future__ import annotations

import fcntl
import os
import socket
import struct


def address_towards(peer: str) -> str:
    """Return this host's address on the route to ``peer``. Sends nothing.

    Raises:
        OSError: the host is unknown, or there is no route to it.
    """
    family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def address_of(interface: str) -> str | None:
    """Return the IPv4 address of a network interface of this host; None if it has none."""
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


def bind_towards(peer: str) -> None:
    """Make gloo, NCCL and TensorPipe use the interface towards ``peer``, unless the environment names one.

    By default gloo uses the address of the host's own name, often 127.0.0.1, which other hosts cannot reach.
    """
    try:
        name = interface_with(address_towards(peer))
    except OSError:
        return  # connecting will fail with a better message
    for variable, value in sockets(name).items() if name else ():
        os.environ.setdefault(variable, value)


def sockets(interface: str) -> dict[str, str]:
    """Return the variables that bind gloo, NCCL and TensorPipe to one interface."""
    return {f"{transport}_SOCKET_IFNAME": interface for transport in ("GLOO", "NCCL", "TP")}

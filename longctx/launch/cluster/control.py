"""The control connection between the launcher and each rank's agent: one JSON object per line, over TCP.

It carries what mpirun or srun would lose: which ranks are up, why a rank ended, rank 0's progress line, requests to
stop. It also ties the two ends together: when it closes, or nothing arrives for a while, each end kills the processes
it started.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterable
from typing import Any, TypeVar

LONGEST = 2**20  # bytes of one message; enough for a traceback
SEND_SECONDS = 10.0
BEAT_SECONDS = 1.0

Message = dict[str, Any]


class Line:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.heard = self.beat = time.monotonic()
        self.closed = False
        self._buffer = b""
        connection.settimeout(SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """Return the descriptor, for ``readable``."""
        return self.socket.fileno()

    def send(self, **message: Any) -> None:
        """Send a message; mark the connection closed if the peer does not accept it within SEND_SECONDS."""
        if self.closed:
            return
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
            self.beat = time.monotonic()
        except OSError:
            self.closed = True

    def keep_alive(self) -> None:
        """Send an empty message if nothing was sent for BEAT_SECONDS."""
        if time.monotonic() - self.beat >= BEAT_SECONDS:
            self.send()

    def silent_for(self, seconds: float) -> bool:
        """Return whether nothing was received for ``seconds``."""
        return time.monotonic() - self.heard > seconds

    def receive(self) -> list[Message]:
        """Return the messages received. Call it when ``readable`` returns this line; sets ``closed`` at end of file."""
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return []
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            messages = [None]
        if len(self._buffer) > LONGEST or not all(isinstance(message, dict) for message in messages):
            self.closed = True  # the peer does not speak this protocol
            return []
        return [message for message in messages if message]

    def close(self) -> None:
        """Close the connection."""
        self.closed = True
        self.socket.close()


Readable = TypeVar("Readable", bound="int | socket.socket | Line")


def readable(sources: Iterable[Readable], seconds: float) -> list[Readable]:
    """Wait at most ``seconds`` and return those of ``sources`` that are readable; there may be thousands."""
    watched = {source if isinstance(source, int) else source.fileno(): source for source in sources}
    poll = select.poll()
    for descriptor in watched:
        poll.register(descriptor, select.POLLIN)
    return [watched[descriptor] for descriptor, _ in poll.poll(seconds * 1000)]


def listen(address: str, port: int = 0) -> socket.socket:
    """Return a socket listening on one address of this host; port 0 takes a free port.

    Raises:
        OSError: the address is not this host's, or the port is in use.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener

"""One connection between the launcher and each rank's agent: JSON objects, one a line, over TCP.

It carries everything that a foreign launcher would lose: who is there, why a rank ended, rank 0's progress line, a
request to stop. And it is the lifeline: whoever sees it close, or hears nothing for a while, ends what it started.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterable
from typing import Any, TypeVar

LONGEST = 2**20  # bytes of one message: a traceback fits, a flood does not
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
        """Send a message; a peer that does not take it within seconds counts as gone."""
        if self.closed:
            return
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
            self.beat = time.monotonic()
        except OSError:
            self.closed = True

    def keep_alive(self) -> None:
        """Let the peer hear from us, if it has not for a second."""
        if time.monotonic() - self.beat >= BEAT_SECONDS:
            self.send()

    def silent_for(self, seconds: float) -> bool:
        """Say whether nothing was heard for so long."""
        return time.monotonic() - self.heard > seconds

    def receive(self) -> list[Message]:
        """Return the messages that have come, once ``readable`` says so; sets ``closed`` at the end."""
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
            self.closed = True  # not one of ours
            return []
        return [message for message in messages if message]

    def close(self) -> None:
        """End the connection."""
        self.closed = True
        self.socket.close()


Readable = TypeVar("Readable", bound="int | socket.socket | Line")


def readable(sources: Iterable[Readable], seconds: float) -> list[Readable]:
    """Return those of ``sources`` that have something to read, after at most ``seconds``. Thousands may be watched."""
    watched = {source if isinstance(source, int) else source.fileno(): source for source in sources}
    poll = select.poll()
    for descriptor in watched:
        poll.register(descriptor, select.POLLIN)
    return [watched[descriptor] for descriptor, _ in poll.poll(seconds * 1000)]


def listen(address: str, port: int = 0) -> socket.socket:
    """Return a socket that listens on one address of this host, at a free port unless one is given.

    Raises:
        OSError: the address is not this host's, or the port is taken.
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

"""What SLURM says about its nodes: their names, and by which address to reach one. Asked of its own `scontrol`."""

from __future__ import annotations

import re
import socket
import subprocess

SECONDS = 30


def nodes(listed: str) -> list[str]:
    """Return the names that a compressed list such as ``node[1-3,7]`` stands for.

    Raises:
        OSError, subprocess.SubprocessError: there is no scontrol here, or it does not know.
    """
    return _ask("show", "hostnames", listed).split()


def address(node: str) -> str:
    """Return a name or address that reaches ``node``: its name where that can be looked up, else what SLURM itself
    uses (NodeAddr). Node names need not be host names, and in clouds often are none.
    """
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    try:
        shown = _ask("--oneliner", "show", "node", node)
    except (OSError, subprocess.SubprocessError):
        return node
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    return found[1] if found else node


def _ask(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout

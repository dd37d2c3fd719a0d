"""Query SLURM's `scontrol` for names and addresses of nodes."""

from __future__ import annotations

import re
import socket
import subprocess

SECONDS = 30


def nodes(listed: str) -> list[str]:
    """Return the node names in a compressed list such as ``node[1-3,7]``.

    Raises:
        OSError, subprocess.SubprocessError: scontrol is missing or fails.
    """
    return _ask("show", "hostnames", listed).split()


def address(node: str) -> str:
    """Return a name or address of ``node``: its name if it can be resolved, else the address that SLURM uses
    (NodeAddr). Node names need not be host names, and in clouds often are not.
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

"""What a command finds around it before it does anything: a terminal that may lack characters, a folder to run in."""

from __future__ import annotations

import io
import os
import sys

from longctx.errors import ConfigError


def settle() -> None:
    """Have characters that a terminal lacks written as ``\\x…``, and refuse a working folder that was deleted.

    Raises:
        ConfigError: no relative path means anything in the folder in which this process runs.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the folder in which this command runs was deleted; change to one that exists") from None

"""Prepare a command's standard streams and check its working directory."""

from __future__ import annotations

import io
import os
import sys

from longctx.errors import ConfigError


def settle() -> None:
    """Print characters that the terminal cannot encode as ``\\x…``; reject a deleted working directory.

    Raises:
        ConfigError: the working directory was deleted, so that relative paths have no meaning.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the folder in which this command runs was deleted; change to one that exists") from None

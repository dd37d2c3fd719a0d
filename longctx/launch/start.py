"""Start a checked configuration: on this machine, or on the hosts of the `launch` section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.errors import LaunchError
from longctx.train.report.console import guard_standard_streams
from longctx.world import launched_by

if TYPE_CHECKING:
    from longctx.config.derived import Derived
    from longctx.config.schema import RunConfig


def require_own_shell(config_path: Path) -> None:
    """Raise LaunchError inside a job of several ranks, each of which would start a job of its own."""
    variables = launched_by()
    if variables is not None:
        raise LaunchError(
            f"`longctx train` starts its own ranks, but this shell is inside a launched job ({variables}); run "
            f"launch/train.py --config {config_path} under that launcher, or unset both variables"
        )


def start(config: RunConfig, sizes: Derived, config_path: Path, overrides: Sequence[str]) -> int:
    """Run a job and return its exit code.

    Args:
        config: resolved and checked.
        sizes: what follows from it.
        config_path, overrides: what it came from, for the ranks' command lines.

    Raises:
        LongctxError: the job cannot be started from here.
    """
    guard_standard_streams()  # losing the console must not end the run
    if config.launch.launcher != "local":
        from longctx.launch.cluster import run as cluster

        return cluster.train(config, sizes)
    from longctx.launch import hardware, local

    hardware.require_dtype(config.model.dtype)
    return local.train(config, config_path, overrides, world=sizes.world)

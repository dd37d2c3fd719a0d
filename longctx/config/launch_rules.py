"""Rules of the `launch:` section: names are names, and nothing is given that the chosen launcher would not read."""

from __future__ import annotations

from collections.abc import Iterator

from longctx.config.hosts import is_interface, is_variable, once_each, parse_host, require_users, ssh_option
from longctx.config.problems import show
from longctx.config.sections.launch import LaunchSection
from longctx.errors import LaunchError

Broken = tuple[str, str, str]  # key, message, code

_OVER_SSH = ("deepspeed", "openmpi", "mpich")
_WITH_OPTIONS = ("openmpi", "mpich", "slurm")


def broken_launch(launch: LaunchSection, resume: str) -> Iterator[Broken]:
    """Yield every rule that the section breaks; ``resume`` is checkpoint.resume."""
    yield from _hosts(launch)
    if launch.interface != "auto" and not is_interface(launch.interface):
        yield "interface", f"got {show(launch.interface)}; write a name such as eth0, or auto", "name"
    for name in launch.environment:
        if not is_variable(name):
            yield "environment", f"got {show(name)}; write a variable's name, or a beginning as in NCCL_*", "name"
    if launch.restarts and resume == "never":
        yield "restarts", f"got {launch.restarts}, but checkpoint.resume is never; change one", "idle-key"
    yield from _ssh(launch)
    if launch.options and launch.launcher not in _WITH_OPTIONS:
        message = f"are for {', '.join(_WITH_OPTIONS)}; launcher is {launch.launcher}, remove the key"
        yield "options", message, "idle-key"


def _hosts(launch: LaunchSection) -> Iterator[Broken]:
    if launch.hosts:
        try:
            require_users(once_each([parse_host(text) for text in launch.hosts]), launch.launcher)
        except LaunchError as error:
            yield "hosts", str(error), "name"
    if launch.hosts and launch.hostfile:
        yield "hostfile", "hosts are given too; remove one of them", "conflict"
    given = launch.hosts or launch.hostfile
    if launch.launcher == "local":
        for name in ("hosts", "hostfile"):
            if getattr(launch, name):
                yield name, "is not read by launcher local; write deepspeed, openmpi, mpich or slurm", "idle-key"
    elif launch.launcher != "slurm" and not given:
        yield "hosts", f"is missing; launcher {launch.launcher} needs hosts, or a hostfile", "missing"


def _ssh(launch: LaunchSection) -> Iterator[Broken]:
    for text in launch.ssh_options:
        wrong = ssh_option(text)
        if wrong:
            yield "ssh_options", f"got {show(text)}; {wrong}", "ssh-option"
    if launch.launcher not in _OVER_SSH:
        for name in ("ssh_port", "ssh_options"):
            if getattr(launch, name):
                yield name, f"is not read by launcher {launch.launcher}; remove the key", "idle-key"

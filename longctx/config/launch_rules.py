"""Rules of the `launch:` section: valid names, and no key that the chosen launcher ignores."""

from __future__ import annotations

from collections.abc import Iterator

from longctx.config.findings import Finding, Rule
from longctx.config.hosts import Host, is_interface, is_variable, once_each, parse_host, require_users, ssh_option
from longctx.config.problems import show
from longctx.config.schema import RunConfig
from longctx.errors import LaunchError

_OVER_SSH = ("deepspeed", "openmpi", "mpich")
_WITH_OPTIONS = ("openmpi", "mpich", "slurm")


def _hosts(config: RunConfig) -> Iterator[Finding]:
    hosts: list[Host] = []
    for text in config.launch.hosts:
        try:
            hosts.append(parse_host(text))
        except LaunchError as error:
            yield Finding("launch.hosts", str(error), "name")
    if hosts:
        try:
            require_users(once_each(hosts), config.launch.launcher)
        except LaunchError as error:
            yield Finding("launch.hosts", str(error), "name")


def _hostfile_beside_hosts(config: RunConfig) -> Iterator[Finding]:
    if config.launch.hosts and config.launch.hostfile:
        yield Finding("launch.hostfile", "hosts are given too; remove one of them", "conflict")


def _hosts_of_the_launcher(config: RunConfig) -> Iterator[Finding]:
    launch = config.launch
    if launch.launcher == "local":
        for name in ("hosts", "hostfile"):
            if getattr(launch, name):
                message = "is not read by launcher local; write deepspeed, openmpi, mpich or slurm"
                yield Finding(f"launch.{name}", message, "idle-key")
    elif launch.launcher != "slurm" and not (launch.hosts or launch.hostfile):
        message = f"is missing; launcher {launch.launcher} needs hosts, or a hostfile"
        yield Finding("launch.hosts", message, "missing")


def _interface(config: RunConfig) -> Iterator[Finding]:
    name = config.launch.interface
    if name != "auto" and not is_interface(name):
        yield Finding("launch.interface", f"got {show(name)}; write a name such as eth0, or auto", "name")


def _environment(config: RunConfig) -> Iterator[Finding]:
    for name in config.launch.environment:
        if not is_variable(name):
            message = f"got {show(name)}; write a variable's name, or a prefix such as NCCL_*"
            yield Finding("launch.environment", message, "name")


def _restarts(config: RunConfig) -> Iterator[Finding]:
    if config.launch.restarts and config.checkpoint.resume == "never":
        message = f"got {config.launch.restarts}, but checkpoint.resume is never; change one"
        yield Finding("launch.restarts", message, "idle-key")


def _ssh_options(config: RunConfig) -> Iterator[Finding]:
    for text in config.launch.ssh_options:
        wrong = ssh_option(text)
        if wrong:
            yield Finding("launch.ssh_options", f"got {show(text)}; {wrong}", "ssh-option")


def _ssh(config: RunConfig) -> Iterator[Finding]:
    launch = config.launch
    if launch.launcher not in _OVER_SSH:
        for name in ("ssh_port", "ssh_options"):
            if getattr(launch, name):
                message = f"is not read by launcher {launch.launcher}; remove the key"
                yield Finding(f"launch.{name}", message, "idle-key")


def _options(config: RunConfig) -> Iterator[Finding]:
    launch = config.launch
    if launch.options and launch.launcher not in _WITH_OPTIONS:
        message = f"are for {', '.join(_WITH_OPTIONS)}; launcher is {launch.launcher}, remove the key"
        yield Finding("launch.options", message, "idle-key")


RULES: tuple[Rule, ...] = (
    _hosts,
    _hostfile_beside_hosts,
    _hosts_of_the_launcher,
    _interface,
    _environment,
    _restarts,
    _ssh_options,
    _ssh,
    _options,
)

"""The command that starts the ranks, for every launcher: lists of arguments, and one quoted word where ssh needs it.

ssh joins what it is given and hands it to the login shell of the other side. So the remote command is one argument
here, quoted for a POSIX shell (sh, bash, zsh, dash). Everything else never meets a shell.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from typing import NamedTuple

from longctx.config.hosts import bare
from longctx.config.sections.launch import LaunchSection
from longctx.errors import LaunchError
from longctx.launch.environment import AGENTS
from longctx.network import address_of, address_towards

Hosts = Sequence[tuple[str, int]]  # (name, ranks)
_SSH = ("-T", "-x", "-a", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=6")
_TOOLS = {"deepspeed": "ssh", "openmpi": "mpirun", "mpich": "mpiexec.hydra", "slurm": "srun"}


class Command(NamedTuple):
    """A process of the launcher's host."""

    label: str
    """the host it starts ranks on, or the launcher's name where it starts all"""
    argv: tuple[str, ...]


def commands(launch: LaunchSection, hosts: Hosts, python: str, python_path: str, spec_path: str) -> list[Command]:
    """Return what starts an agent for every rank of ``hosts``; agents then read the job spec at ``spec_path``."""
    agent = ["-m", "longctx.launch.cluster.agent", spec_path]
    if launch.launcher == "deepspeed":
        return [
            Command(name, ssh(name, remote(python, python_path, _deepspeed(hosts, index, spec_path)), launch))
            for index, (name, _) in enumerate(hosts)
        ]
    build = {"openmpi": _openmpi, "mpich": _mpich, "slurm": _slurm}[launch.launcher]
    argv = (*build(launch, hosts), *launch.options, *remote(python, python_path, agent))
    return [Command(launch.launcher, argv)]


def require_tools(launch: LaunchSection) -> None:
    """Raise LaunchError unless the launcher's program is here."""
    tool = _TOOLS[launch.launcher]
    if shutil.which(tool) is None:
        raise LaunchError(f"launcher {launch.launcher} needs {tool}, which is not on PATH here; install it")


def remote(python: str, python_path: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments that run Python on a host, with the checkout importable if longctx runs from one."""
    found = ["env", f"PYTHONPATH={python_path}"] if python_path else []
    return [*found, python, *arguments]


def ssh(host: str, arguments: Sequence[str], launch: LaunchSection) -> tuple[str, ...]:
    """Return the arguments that run a command on ``host``; every one of ``arguments`` arrives there unchanged."""
    # the user's first: ssh keeps the first value it sees
    return ("ssh", *_ssh_options(launch), *_SSH, "-o", "ConnectTimeout=15", "--", host, shlex.join(arguments))


def _deepspeed(hosts: Hosts, index: int, spec_path: str) -> list[str]:
    """DeepSpeed's own launcher of one host, as `deepspeed --hostfile` runs it, but not through a shell string.

    The meeting point given here is a placeholder that it insists on: agents bring the real one.
    """
    world = {name: list(range(count)) for name, count in hosts}
    described = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    return [
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={described}",
        f"--node_rank={index}",
        f"--master_addr={bare(hosts[0][0])}",
        "--master_port=29500",
        "--no_local_rank",
        "--module",
        "longctx.launch.cluster.agent",
        spec_path,
    ]


def _openmpi(launch: LaunchSection, hosts: Hosts) -> list[str]:
    arguments = ["mpirun", "-n", str(_ranks(hosts)), "--host", _counted(hosts), "--map-by", "slot", "--bind-to", "none"]
    options = _ssh_options(launch)
    if options:  # no word of these has a space: mpirun splits the text there
        arguments += ["--prtemca", "plm_ssh_args", " ".join(options)]
    # By default mpirun's daemon outlives the loss of its connection by eight minutes. It must notice before the agents
    # do: once it has words of theirs to send, the kernel asks no more and only repeats them, for a quarter of an hour.
    silence = launch.silence_seconds
    for name, number in (("time", silence // 4), ("intvl", silence * 3 // 20), ("probes", 3)):
        arguments += ["--prtemca", f"oob_tcp_keepalive_{name}", str(max(number, 1))]
    if launch.interface != "auto":
        arguments += ["--prtemca", "prte_if_include", launch.interface]
    return arguments


def _mpich(launch: LaunchSection, hosts: Hosts) -> list[str]:
    """MPICH's own name for its starter: mpiexec alone is OpenMPI's too. It would hand on this shell's environment."""
    options = _ssh_options(launch)
    arguments = ["env", f"HYDRA_LAUNCHER_EXTRA_ARGS={' '.join(options)}"] if options else []
    arguments += ["mpiexec.hydra", "-launcher", "ssh", "-genvlist", ",".join(AGENTS)]
    here = _own_address(launch, hosts)
    arguments += ["-localhost", here] if here else []  # else hosts call this one by its name, which may be theirs
    return [*arguments, "-n", str(_ranks(hosts)), "-hosts", _counted(hosts)]


def _slurm(launch: LaunchSection, hosts: Hosts) -> list[str]:
    counts = {count for _, count in hosts}
    if len(counts) > 1:
        raise LaunchError(
            "launcher slurm wants as many ranks on every host, but here they are "
            + ", ".join(f"{name}:{count}" for name, count in hosts[:8])
            + "; choose a mesh that fills the hosts, or fewer hosts"
        )
    arguments = ["srun", f"--ntasks={_ranks(hosts)}", f"--nodes={len(hosts)}", f"--ntasks-per-node={counts.pop()}"]
    arguments += ["--nodelist=" + ",".join(name for name, _ in hosts), "--distribution=block", "--kill-on-bad-exit=1"]
    arguments += ["--unbuffered", f"--chdir={os.sep}"]  # agents go to launch.folder themselves
    return [*arguments, "--export=" + ",".join(AGENTS)]  # else srun would send this shell's whole environment


def _own_address(launch: LaunchSection, hosts: Hosts) -> str | None:
    """Return the address by which hosts reach this one, where it can be told. Nothing is sent."""
    try:
        return address_of(launch.interface) or address_towards(bare(hosts[-1][0]))
    except OSError:
        return None


def _ssh_options(launch: LaunchSection) -> list[str]:
    """Return what the YAML says to ssh. No word of it has a space."""
    options = [word for option in launch.ssh_options for word in ("-o", option)]
    return options + (["-p", str(launch.ssh_port)] if launch.ssh_port else [])


def _counted(hosts: Hosts) -> str:
    return ",".join(f"{name}:{count}" for name, count in hosts)


def _ranks(hosts: Hosts) -> int:
    return sum(count for _, count in hosts)

"""A SLURM of its own to test with: one slurmctld here, a slurmd on every host of ``namespaces``, and munge.

Needs Debian's slurm-wlm and munge. All its files are in one folder; no service of the machine is used or started.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from namespaces import NETWORK, Hosts

CONTROLLER_PORT, NODE_PORT = 26817, 26818
PATH = f"{os.environ['PATH']}:/usr/sbin"
CONFIG = """
ClusterName=longctx
SlurmctldHost={controller_name}({network}.254)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=5
MpiDefault=none
MailProg=/bin/true
"""


class Slurm:
    """A cluster whose nodes are ``hosts``, with four cores each. Their names stand for nothing outside of SLURM."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, hosts.count + 1)]
        self.daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._configure(hosts)
            munge = ("--key-file=munge.key", "--socket=munge.socket", "--pid-file=munge.pid", "--seed-file=munge.seed")
            places = [f"{option.partition('=')[0]}={folder}/{option.partition('=')[2]}" for option in munge]
            self._start("munged", "--foreground", "--force", *places)
            self._wait("munge's socket", lambda: (folder / "munge.socket").exists())
            self._start("slurmctld", "-D", "-c")
            for name, node in zip(hosts.names, self.nodes, strict=True):
                named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', node)
                self._start("slurmd", "-D", "-N", node, prefix=("ip", "netns", "exec", name, *named))
            self._wait("idle nodes", lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == str(hosts.count))
        except BaseException:
            self.close()
            raise

    def _configure(self, hosts: Hosts) -> None:
        os.chmod(self.folder, 0o755)
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        (self.folder / "plugstack.conf").touch()
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        text = CONFIG.format(
            network=NETWORK, controller_name=socket.gethostname(), controller=CONTROLLER_PORT, folder=self.folder
        )
        for node, address in zip(self.nodes, hosts.addresses, strict=True):
            text += f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={NODE_PORT} CPUs=4\n"
        text += f"PartitionName=debug Nodes={','.join(self.nodes)} Default=YES State=UP\n"
        (self.folder / "slurm.conf").write_text(text)

    @property
    def environment(self) -> dict[str, str]:
        """What srun, salloc and the like need to find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def _start(self, tool: str, *arguments: str, prefix: tuple[str, ...] = ()) -> None:
        program = shutil.which(tool, path=PATH)
        assert program, f"{tool} is not installed (Debian: apt install slurm-wlm munge)"
        with (self.folder / "daemons.log").open("ab") as log:
            self.daemons.append(
                subprocess.Popen(
                    [*prefix, program, *arguments],
                    env=os.environ | self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _wait(self, what: str, there: object) -> None:
        deadline = time.monotonic() + 40
        while not there():  # type: ignore[operator]
            ended = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            said = (self.folder / "daemons.log").read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline and not ended, f"no {what}; ended: {ended}\n{said}"
            time.sleep(0.2)

    def ask(self, *command: str) -> str:
        """Return what sinfo, squeue, scontrol or sbatch prints."""
        environment = _with_this_checkout() | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        return (done.stdout or done.stderr).strip()

    def steps(self) -> str:
        """Return the jobs that SLURM still has."""
        return self.ask("squeue", "-h", "-o", "%i %T")

    def close(self) -> None:
        """End all daemons, the last started first, by their own process ids."""
        for daemon in reversed(self.daemons):
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _with_this_checkout() -> dict[str, str]:
    """Return an environment in which a batch job finds `longctx`, and this copy of it."""
    root = Path(__file__).resolve().parents[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PATH": path, "PYTHONPATH": found, "DS_ACCELERATOR": "cpu"}

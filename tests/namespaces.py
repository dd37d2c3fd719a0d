"""Hosts to test the launcher on: network namespaces with addresses, host names and sshds of their own.

Needs root, iproute2, sshd and ssh (Debian: openssh-server, pdsh for DeepSpeed's own multi-node runner). Nothing of the
machine is changed: no file outside ``folder``, no service, and names that say whose they are. ``close`` takes all away.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

PORT = 2222
NETWORK = "10.231.77"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout


class Hosts:
    """``count`` hosts on one bridge; this machine has an address there too."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.addresses = [f"{NETWORK}.{number}" for number in range(1, count + 1)]
        self.bridge = "longctx-br"
        self.names = [f"longctx-h{number}" for number in range(1, count + 1)]
        self.sshds: list[subprocess.Popen[bytes]] = []
        self.bystanders: set[int] = set()
        """processes on the hosts that a test does not count"""
        try:
            self._make_network()
            self._make_keys()
            for name in self.names:
                self._start_sshd(name)
            for address in self.addresses:
                self._wait_for(address)
        except BaseException:
            self.close()
            raise

    def _make_network(self) -> None:
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "addr", "add", f"{NETWORK}.254/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        for number, name in enumerate(self.names, 1):
            outside = f"longctx-v{number}"
            run("ip", "netns", "add", name)
            run("ip", "link", "add", outside, "type", "veth", "peer", "name", f"eth{number}", "netns", name)
            run("ip", "link", "set", outside, "master", self.bridge, "up")
            inside = ("ip", "-n", name)
            run(*inside, "addr", "add", f"{self.addresses[number - 1]}/24", "dev", f"eth{number}")
            run(*inside, "link", "set", f"eth{number}", "up")
            run(*inside, "link", "set", "lo", "up")

    def _make_keys(self) -> None:
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "host_key"))
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "user_key"))
        (self.folder / "authorized_keys").write_text((self.folder / "user_key.pub").read_text())
        host_key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text("".join(f"[{a}]:{PORT} {host_key}" for a in self.addresses))
        (self.folder / "sshd_config").write_text(
            f"Port {PORT}\nHostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/authorized_keys\n"
            "PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\n"
            "MaxStartups 100\nUseDNS no\n"
        )
        (self.folder / "ssh_config").write_text(
            f"Host *\n  Port {PORT}\n  BatchMode yes\n  IdentitiesOnly yes\n  IdentityFile {self.folder}/user_key\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n"
        )

    @property
    def ssh_options(self) -> list[str]:
        """For ``launch.ssh_options``."""
        known, key = self.folder / "known_hosts", self.folder / "user_key"
        return [f"UserKnownHostsFile={known}", f"IdentityFile={key}", "IdentitiesOnly=yes"]

    def _start_sshd(self, name: str) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        script = f"hostname {name} && exec /usr/sbin/sshd -D -e -f {self.folder}/sshd_config"
        with (self.folder / f"{name}.log").open("ab") as log:
            self.sshds.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", script],
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def ssh(self, index: int, command: str) -> str:
        """Run a command on a host and return what it printed."""
        return run("ssh", "-F", str(self.folder / "ssh_config"), self.addresses[index], command)

    def _wait_for(self, address: str) -> None:
        deadline = time.monotonic() + 20
        command = ["ssh", "-F", str(self.folder / "ssh_config"), address, "true"]
        while subprocess.run(command, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, f"sshd at {address} does not answer"
            time.sleep(0.2)

    def processes(self, index: int) -> list[int]:
        """Processes of a host, without its daemons and bystanders."""
        listed = map(int, run("ip", "netns", "pids", self.names[index]).split())
        return [pid for pid in listed if pid not in self.bystanders and not _is_daemon(pid)]

    def unplug(self, index: int) -> None:
        """Cut a host off, as a power cut or a broken switch does: no connection is closed."""
        run("ip", "link", "set", f"longctx-v{index + 1}", "down")

    def plug_in(self, index: int) -> None:
        """Connect it again."""
        run("ip", "link", "set", f"longctx-v{index + 1}", "up")

    def close(self) -> None:
        """Take everything away that was made."""
        for index, name in enumerate(self.names):
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in listed.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", f"longctx-v{index + 1}"], capture_output=True, check=False)
        for sshd in self.sshds:
            sshd.wait(10)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, check=False)


def _is_daemon(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("sshd", "slurmd", "slurmstepd")
    except OSError:
        return True

"""The agent: beside every rank on another host, started by ssh, mpirun or srun, itself too small to fail.

``python -m longctx.launch.cluster.agent JOBSPEC`` connects to the launcher, reports this host, waits for the order to
start, runs the rank as the local launcher would, reports how it ended, and kills it when the launcher is gone
or says so.
"""

from __future__ import annotations

import codecs
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from longctx.errors import LaunchError, LongctxError
from longctx.launch import hardware, report
from longctx.launch.cluster import facts, jobspec
from longctx.launch.cluster.control import Line, Message, listen, readable
from longctx.launch.environment import of_this_host
from longctx.launch.processes import Process, exit_code, kill
from longctx.network import address_of, interface_with, sockets
from longctx.world import launched_world

CONNECT_SECONDS = 30.0
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(arguments: list[str] | None = None) -> int:
    """Run one rank for the launcher that wrote the job spec, and return its exit code."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    try:
        given = jobspec.load(Path(path))
        os.environ.update(given.environment)
        with tempfile.TemporaryDirectory(prefix="longctx-") as errors:
            agent = _Agent(given, Path(errors))
            try:
                return agent.run()
            finally:
                agent.end()
    except LongctxError as error:
        print(f"longctx: {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return 1


class _Agent:
    def __init__(self, given: jobspec.JobSpec, errors: Path) -> None:
        self.spec, self.errors = given, errors
        world, self.rank = launched_world()
        if (world or 1) != given.world:
            raise LaunchError(f"this is rank {self.rank} of {world or 1}, but the job has {given.world} ranks")
        self.line = _connect(given)
        self.address, self.interface = _place_in_the_network(given, self.line)
        self.meeting = listen(self.address) if self.rank == 0 else None
        self.process: Process | None = None
        self.console = -1
        for number in FORWARDED:
            signal.signal(number, self._forward)

    def run(self) -> int:
        """Introduce this host, wait for the start, and stay until the rank has ended and the launcher knows."""
        port = self.meeting.getsockname()[1] if self.meeting else 0
        about = facts.gather(self.spec)
        self.line.send(token=self.spec.token, rank=self.rank, facts=about, address=self.address, port=port)
        ended = None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while not self.line.closed and not self.line.silent_for(self.spec.silence_seconds):
            watched: list[Line | int] = [self.line, *([self.console] if self.console >= 0 else [])]
            ready = readable(watched, 0.1)
            if self.line in ready:
                for message in self.line.receive():
                    self._obey(message)
            if self.console in ready:
                self._pass_on(decoder)
            elif ended is None and self.process is not None:  # only when its last words are passed on
                ended = exit_code(self.process)
                if ended is not None:
                    why = report.read(self.errors, self.rank)
                    self.line.send(ended=ended, report=why, tail=report.tail(self._log())[-20_000:])
            self.line.keep_alive()
        return 1 if ended is None else ended & 0xFF

    def end(self) -> None:
        """Kill the rank and all that it started; leave the launcher."""
        if self.process is not None:
            kill([self.process])
        self.line.close()

    def _obey(self, message: Message) -> None:
        if "start" in message and self.process is None:
            self._start(*message["start"])
        elif "signal" in message:
            self._forward(int(message["signal"]), None)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.process is not None and exit_code(self.process) is None:
            os.kill(self.process.pid, number)

    def _pass_on(self, decoder: codecs.IncrementalDecoder) -> None:
        data = os.read(self.console, 65536)
        if data:
            self.line.send(console=decoder.decode(data))
        else:
            os.close(self.console)
            self.console = -1

    def _log(self) -> Path:
        return Path(self.spec.output) / "logs" / f"rank-{self.rank:05d}.log"

    def _start(self, address: str, port: int) -> None:
        handed, own = [], {}
        if self.meeting is not None:
            self.console, far_end = os.pipe()
            handed = [self.meeting.fileno(), far_end]
            own = {"LONGCTX_LISTENER": str(handed[0]), "LONGCTX_CONSOLE": str(far_end)}
        self._log().parent.mkdir(parents=True, exist_ok=True)
        with self._log().open("ab") as log:
            report.mark(log)
            self.process = subprocess.Popen(
                list(self.spec.command),
                env=self._environment(address, port) | own,
                cwd=self.spec.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=handed,
                start_new_session=True,
            )
        if self.meeting is not None:
            os.close(far_end)
            self.meeting.close()

    def _environment(self, address: str, port: int) -> dict[str, str]:
        _, local_rank, local_world = self.spec.seat(self.rank)
        return {
            **of_this_host(),
            **({"DS_ACCELERATOR": "cpu"} if hardware.gpus() == 0 else {}),
            **sockets(self.interface),
            **self.spec.environment,
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.spec.world),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(local_world),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(hardware.threads_per_rank(local_world)),
            "PYTHONPATH": self.spec.python_path,
            "PYTHONUNBUFFERED": "1",
            "LONGCTX_PARENT": str(os.getpid()),
            "LONGCTX_COLUMNS": str(self.spec.columns),
            report.FOLDER: str(self.errors),
        }


def _connect(given: jobspec.JobSpec) -> Line:
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return Line(socket.create_connection((given.address, given.port), timeout=5))
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, ConnectionRefusedError):
                raise LaunchError(
                    f"the launcher at {given.address} port {given.port} cannot be reached from here ({error}); a "
                    "firewall, or the wrong launch.interface"
                ) from None
            time.sleep(0.5)


def _place_in_the_network(given: jobspec.JobSpec, line: Line) -> tuple[str, str]:
    """Return (address, interface) for this host's ranks."""
    if given.interface != "auto":
        address = address_of(given.interface)
        if address is None:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise LaunchError(f"there is no interface {given.interface!r} with an address here; there are {names}")
        return address, given.interface
    address = line.socket.getsockname()[0]
    interface = interface_with(address)
    if interface is None:
        raise LaunchError(f"no interface here has {address}; name one in launch.interface")
    return address, interface


if __name__ == "__main__":
    sys.exit(main())

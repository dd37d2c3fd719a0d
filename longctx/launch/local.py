"""Start the ranks of a job on this machine, watch them, and kill what is left at the end.

Each rank is a process in its own session, started from an argument list, with its output in ``logs/``; rank 0 also gets
this terminal for its progress line. The launcher binds the rendezvous socket to 127.0.0.1 and rank 0 inherits it, so
no port is fixed and no other process can take it in between. When a rank fails, the others are killed by process id and
the first cause is printed once. Ctrl-C asks the ranks to save and stop; Ctrl-C after that kills them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.errors import LaunchError
from longctx.launch import hardware, report
from longctx.launch.environment import RESOLVED
from longctx.launch.prepare import prepare
from longctx.launch.processes import exit_code, kill
from longctx.launch.watch import FAILED, Watch
from longctx.train.folder import require_usable
from longctx.train.lock import require_free
from longctx.train.signals import PREEMPTED, code_of

if TYPE_CHECKING:
    from longctx.config.schema import RunConfig


def train(config: RunConfig, config_path: Path, overrides: Sequence[str], *, world: int) -> int:
    """Run ``config`` on ``world`` local ranks and return the job's exit code. Logs go to `logs` in output.folder.

    Args:
        config: resolved; ranks read a copy of it, so later changes of the YAML or the environment have no effect.
        config_path: the YAML it came from, for the ranks' command lines.
        overrides: its ``a.b=c`` arguments, for the ranks' command lines.
        world: number of ranks.

    Returns:
        0 when done, 75 when stopped on request after saving, 1 after a failure, 130 when killed by Ctrl-C while
        stopping; 130, 143 or 75 when stopped by a signal before the first step.

    Raises:
        LaunchError, MissingPackageError: the job cannot be started on this machine.
        CheckpointError: the run directory is in use, or holds a run that cannot be resumed.
    """
    from longctx.config.write import dump

    folder = Path(config.output.folder).absolute()
    require_usable(folder)
    require_free(folder)
    on_gpu = hardware.gpus() > 0
    if on_gpu and world > hardware.gpus():
        raise LaunchError(
            f"mesh has {world} ranks, but this machine has {hardware.gpus()} GPUs (one rank per GPU); lower mesh.ring "
            "or mesh.data, or set DS_ACCELERATOR=cpu to run on the CPU"
        )
    if not on_gpu:
        prepare()
    command = [sys.executable, "-m", "longctx.launch.rank", "--config", str(config_path), *overrides]
    extra = {} if on_gpu else {"DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory(prefix="longctx-config-") as private:
        resolved = Path(private) / "config.yaml"
        resolved.write_text(dump(config), encoding="utf-8")
        return run(command, world=world, logs=folder / "logs", environment=extra | {RESOLVED: str(resolved)})


def run(command: Sequence[str], *, world: int, logs: Path, environment: dict[str, str] | None = None) -> int:
    """Run ``command`` as ``world`` ranks and return the job's exit code (as ``train`` does).

    Raises:
        LaunchError: the log folder cannot be created, or the rendezvous socket cannot be bound.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{logs} cannot be created: {error.strerror}; choose another output.folder") from None
    with tempfile.TemporaryDirectory(prefix="longctx-") as errors, _listen() as listener:
        job = _Job(logs, Path(errors))
        with job.watch.handling_signals(job.forward):
            try:
                job.start(command, world, listener, environment or {})
                return job.wait()
            finally:
                job.kill()


class _Job:
    """The processes of one job, by rank."""

    def __init__(self, logs: Path, errors: Path) -> None:
        self.logs, self.errors = logs, errors
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.watch = Watch()
        self.told: set[int] = set()  # process ids that have received the request to stop

    def start(self, command: Sequence[str], world: int, listener: socket.socket, environment: dict[str, str]) -> None:
        """Start all ranks; the caller kills those already started when this raises."""
        address, port = listener.getsockname()
        common = {
            **os.environ,
            **environment,
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(hardware.threads_per_rank(world)),
            "PYTHONPATH": hardware.python_path(),
            "PYTHONUNBUFFERED": "1",
            "LONGCTX_PARENT": str(os.getpid()),
            report.FOLDER: str(self.errors),
        }
        for transport in ("GLOO", "NCCL", "TP"):  # all ranks are on this machine: listen on loopback only
            common.setdefault(f"{transport}_SOCKET_IFNAME", "lo")
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            inherited: list[int] = []
            if rank == 0:
                console = _terminal()
                inherited = [listener.fileno(), console]
                own |= {"LONGCTX_LISTENER": str(listener.fileno()), "LONGCTX_CONSOLE": str(console)}
            with (self.logs / f"rank-{rank:05d}.log").open("ab") as log:
                report.mark(log)
                self.ranks.append(
                    subprocess.Popen(
                        list(command),
                        env=common | own,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        pass_fds=inherited,
                        start_new_session=True,  # Ctrl-C in the terminal reaches the launcher only
                    )
                )
            if rank == 0:
                os.close(console)

    def wait(self) -> int:
        """Wait for all ranks and return the job's exit code; print the cause if one failed."""
        while True:
            self._send_stop()
            codes = {rank: exit_code(process) for rank, process in enumerate(self.ranks)}
            ended = {rank: code for rank, code in codes.items() if code is not None}
            failed = any(self._failed(rank, code) for rank, code in ended.items())
            code = self.watch.exit_code(ended.values(), len(codes), failed)
            if code is not None:
                return self._explain(codes) if code == FAILED else code
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill every remaining rank and the processes it started, and wait until the ranks have exited."""
        kill(self.ranks)

    def forward(self, number: int) -> None:
        """Send a signal to the ranks."""
        if number == signal.SIGUSR2:
            self._send(number, self.ranks)
            return
        # a signal may arrive while `start` runs, so each rank's first signal is sent by `_send_stop`, exactly once
        self._send(number, [process for process in self.ranks if process.pid in self.told])
        self._send_stop()

    def _send_stop(self) -> None:
        """Send the request to stop to ranks that were started after it arrived."""
        if not self.watch.signal:
            return
        new = [process for process in self.ranks if process.pid not in self.told]
        self.told |= {process.pid for process in new}
        self._send(self.watch.signal, new)

    def _send(self, number: int, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            if exit_code(process) is None:
                os.kill(process.pid, number)

    def _failed(self, rank: int, code: int) -> bool:
        """Return whether a rank ended in a way that leaves the others waiting for it."""
        return code not in (0, PREEMPTED) or (code == PREEMPTED and report.read(self.errors, rank) is not None)

    def _explain(self, codes: dict[int, int | None]) -> int:
        """Print why the job failed, and return its exit code."""
        bad = {rank: code for rank, code in codes.items() if code is not None and self._failed(rank, code)}
        sentence = report.stopped(self.errors, bad.values(), self.watch.signal)
        if sentence is not None:
            print(f"longctx: {sentence}", file=sys.stderr, flush=True)
            return code_of(self.watch.signal) if self.watch.signal else next(iter(bad.values()))
        print(f"longctx: {report.first_cause(self.errors, codes, self.logs)}", file=sys.stderr, flush=True)
        return 1


def _terminal() -> int:
    """Duplicate our standard output's descriptor, also where sys.stdout was replaced; /dev/null's if it is closed."""
    stream = getattr(sys.stdout, "stream", sys.stdout)
    if stream is None:  # closed before Python started: another file may have its number now
        return _nowhere()
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):
        number = 1
    try:
        return os.dup(number)
    except OSError:
        return _nowhere()


def _nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)


def _listen() -> socket.socket:
    """Return a listening socket on 127.0.0.1: at MASTER_PORT if the user set one, else at any free port."""
    wanted = os.environ.get("MASTER_PORT", "0")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(wanted)))
        listener.listen(1024)
    except (OSError, ValueError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "not a port number"
        raise LaunchError(
            f"MASTER_PORT={wanted} cannot be used on 127.0.0.1 ({reason}); unset it to use a free port"
        ) from None
    _require_loopback(listener)
    return listener


def _require_loopback(listener: socket.socket) -> None:
    """Raise LaunchError if 127.0.0.1 cannot be reached; torch would retry for minutes."""
    try:
        with socket.create_connection(listener.getsockname(), timeout=5):
            listener.accept()[0].close()
    except OSError as error:
        listener.close()
        raise LaunchError(
            f"this machine cannot reach itself at 127.0.0.1 ({error}), which the ranks need; is the loopback interface "
            "up? (ip link set lo up)"
        ) from None

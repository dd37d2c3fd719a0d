"""One job on many hosts: start it, check every host before anything is trained, watch it, and leave nothing behind.

Whatever started the agents (ssh, mpirun, srun), they all call back here. So failures, requests to stop and the end are
handled in one way: our own processes are killed by their ids, and on the other hosts every agent kills what it started
as soon as its connection to us closes.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from longctx.launch import hardware, report
from longctx.launch.cluster.commands import Command
from longctx.launch.cluster.connections import AgentConnection, AgentConnections
from longctx.launch.cluster.jobspec import JobSpec
from longctx.launch.processes import Process, exit_code, kill
from longctx.launch.watch import FAILED, Watch
from longctx.train.signals import PREEMPTED, SIGNALS, code_of, sentence_of

END_SECONDS = 10.0  # for ssh, mpirun and srun to see that their agents are gone


class JobOutcome(NamedTuple):
    """How a job ended."""

    code: int
    again: bool
    """whether starting again could help: a rank or host died, nobody asked for the end, no mistake of the user"""
    absent: frozenset[str] = frozenset()
    """hosts that did not answer, so that nothing was started"""


class Supervisor:
    """The processes and connections of one attempt."""

    def __init__(self, spec: JobSpec, listener: socket.socket, start_seconds: int) -> None:
        self.spec, self.start_seconds = spec, start_seconds
        self.connections = AgentConnections(listener, spec)
        self.logs = Path(spec.output) / "logs"
        self.processes: dict[str, Process] = {}
        self.started = False
        self.watch = Watch()

    def run(self, commands: Sequence[Command]) -> JobOutcome:
        """Run the job to its end."""
        with self.watch.handling_signals(self._forward):
            try:
                self._launch(commands)
                return self._gather() or self._wait()
            finally:
                self._end()

    def check(self, commands: Sequence[Command]) -> JobOutcome:
        """Only find out whether every host is ready."""
        try:
            self._launch(commands)
            return self._gather(start=False) or JobOutcome(0, False)
        finally:
            self._end()

    def _launch(self, commands: Sequence[Command]) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        for command in commands:
            with self._log(command.label).open("wb") as log:
                self.processes[command.label] = subprocess.Popen(
                    list(command.argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )

    def _log(self, label: str) -> Path:
        return self.logs / f"launcher-{label}.log"

    def _gather(self, start: bool = True) -> JobOutcome | None:
        """Wait for every host, look at what each says about itself, and give the word to start."""
        deadline = time.monotonic() + self.start_seconds
        while not self.connections.complete and not self.watch.signal:
            gone = all(exit_code(process) is not None for process in self.processes.values())
            if gone or time.monotonic() > deadline or self._nobody_left_to_come():
                break
            self.connections.poll()
        if self.watch.signal:
            self._say(sentence_of(self.watch.signal))
            return JobOutcome(code_of(self.watch.signal), False)
        problems = self.connections.wrong(hardware.gpus())
        absent = {} if self.connections.complete else self._absent()
        if problems or absent:
            self._say("not started, because of\n" + table(problems | absent))
            return JobOutcome(1, False, frozenset(absent))
        if start:
            self.started = True
            self.connections.send(start=self.connections.by_rank[0].meeting)
        return None

    def _nobody_left_to_come(self) -> bool:
        """Whether each host has either answered in full or seen its command end."""
        missing = {self.spec.seat(rank)[0] for rank in range(self.spec.world) if rank not in self.connections.by_rank}
        return all(host in self.processes and exit_code(self.processes[host]) is not None for host in missing)

    def _absent(self) -> dict[str, list[str]]:
        """Return why the hosts that did not answer did not, as far as their command's output says."""
        found: dict[str, list[str]] = {}
        for rank in range(self.spec.world):
            host = self.spec.seat(rank)[0]
            if rank in self.connections.by_rank or host in found:
                continue
            label = host if host in self.processes else next(iter(self.processes))
            code = exit_code(self.processes[label])
            how = f"no answer in {self.start_seconds} s" if code is None else f"its command {report.ended(code)}"
            said = [line for line in report.tail(self._log(label), 400).splitlines() if any(map(str.isalnum, line))]
            ours = [line for line in said if line.startswith("longctx: ")]
            found[host] = [how + (f": {(ours or said)[-1][-400:]}" if said else "")]
        return found

    def _wait(self) -> JobOutcome:
        """Wait for the end; print the cause if a rank failed or was lost."""
        while True:
            self.connections.poll()
            ended, failed = self.connections.codes, bool(self.connections.endings)
            code = self.watch.exit_code(ended, self.spec.world, failed)
            if code is not None:
                return self._explain() if code == FAILED else JobOutcome(code, False)

    def _explain(self) -> JobOutcome:
        codes = set(self.connections.codes)
        answers = {130, 143, PREEMPTED, 0, *(-number for number in SIGNALS)}
        if self.watch.signal and codes <= answers and not any(one.lost for one in self.connections.endings):
            self._say(sentence_of(self.watch.signal))  # stopped before the loop could promise a checkpoint
            return JobOutcome(code_of(self.watch.signal), False)
        # a host that has gone silent, then what died without a word, is the cause of what others reported
        silent = [one for one in self.connections.endings if one.end is None or one.end.report is None]
        first = (self.connections.silent() or silent or self.connections.endings)[0]
        self._say(self._cause(first))
        users = first.end is not None and first.end.report is not None and bool(first.end.report.get("user"))
        return JobOutcome(1, not users and not self.watch.signal)

    def _cause(self, member: AgentConnection) -> str:
        host = self.spec.seat(member.rank)[0]
        where = f"rank {member.rank} on {host}"
        if member.end is None:
            label = host if host in self.processes else next(iter(self.processes))
            code = exit_code(self.processes[label])
            more = "" if code is None else f"; its command {report.ended(code)}, see {self._log(label)}"
            return f"{where} is lost: {member.lost}{more}"
        if member.end.report is None:
            log = self.logs / f"rank-{member.rank:05d}.log"
            return f"{where} {report.ended(member.end.code)}. The end of {log}:\n{member.end.tail}"
        text = str(member.end.report.get("text"))
        return text if member.end.report.get("user") else f"{where} failed (full output in {self.logs}):\n{text}"

    def _forward(self, number: int) -> None:
        """Have the agents send a signal to their ranks."""
        if self.started:
            self.connections.send(signal=number)

    def _end(self) -> None:
        """Close the connections, let the launcher's processes see that all is over, and kill those that do not."""
        self.connections.close()
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline and any(exit_code(one) is None for one in self.processes.values()):
            time.sleep(0.05)
        kill(list(self.processes.values()))

    def _say(self, text: str) -> None:
        sys.stdout.flush()
        print(f"longctx: {text}", file=sys.stderr, flush=True)


def table(problems: dict[str, list[str]]) -> str:
    """Return what is wrong as one table, a line a problem, the host's name in front."""
    width = max(map(len, problems))
    return "\n".join(f"  {host:<{width}}  {text}" for host, texts in sorted(problems.items()) for text in texts)

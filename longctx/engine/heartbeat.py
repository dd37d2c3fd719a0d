"""Heartbeats of all ranks in the job's store; if one stops, the job ends with an error that names the rank.

A frozen process (SIGSTOP, a swapped-out or dead host, a debugger) closes no connection, so the other ranks would wait
inside a collective until torch's timeout of half an hour. Here a thread of each rank watches the next rank. If its
heartbeat stops for longer than the limit, the error says where the silent rank was last seen and where this one waits.
Both are read from Python's stack frames, so the training loop needs no extra calls.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

from longctx.errors import EngineError
from longctx.mesh import Mesh

KEY = "longctx/beat/"
ENDED = "ended"
FROZEN_SECONDS = 120  # longer than any library call of a training run holds the GIL
_PHASES = {  # module prefix: phase of the loop, outermost first
    "longctx.train.corpus": "preparing the data",
    "longctx.train.checkpoint.checkpointer": "a checkpoint",
    "longctx.engine.evaluate": "an evaluation",
    "longctx.engine.step.window": "engine.weigh",
    "longctx.engine.exchange": "an exchange of all ranks",
    "longctx.attention.passes": "ring attention",
    "longctx.attention.hybrid.ulysses": "the all-to-all of heads",
    "longctx.bounded": "bounded attention",
    "deepspeed.runtime.zero": "DeepSpeed's ZeRO",
}
_METHODS = {"forward": "forward", "backward": "backward", "step": "the update"}  # of longctx.engine.engine


class Heartbeat:
    """The heartbeat threads of one rank.

    Args:
        store: a connection of its own to the job's store.
        rank, world: of this process.
        seconds: without a heartbeat until a rank counts as frozen.
        give_up: called once with the message; it ends the process, whose main thread may never return.
    """

    def __init__(self, store: Any, rank: int, world: int, seconds: float, give_up: Callable[[str], None]) -> None:
        self.store, self.rank, self.world, self.seconds, self.give_up = store, rank, world, seconds, give_up
        self.neighbour = (rank + 1) % world
        self.every = min(max(seconds / 20, 0.1), 5.0)
        self.stopped = threading.Event()
        self._text: str | None = None  # latest heartbeat of the neighbour
        self._changed = self._answered = self._since = time.monotonic()
        self._here, self._patience = "", seconds

    def start(self) -> None:
        """Start both threads."""
        for call in (self._beat, self._watch):
            threading.Thread(target=call, daemon=True, name=f"longctx-heartbeat{call.__name__}").start()

    def stop(self) -> None:
        """Announce that this rank has ended normally, and stop."""
        if not self.stopped.is_set():
            self.stopped.set()
            farewell = threading.Thread(target=self._say, args=(ENDED, 0), daemon=True)
            farewell.start()  # in a thread, because the store's host may be gone or hang
            farewell.join(2)

    def _beat(self) -> None:
        count = 0
        while not self.stopped.wait(self.every):
            count += 1
            here = call_site()
            try:
                self._say(here, count)
                self._hear()
                self._note_stall(here)
            except Exception:  # the store is gone: the job ends, and torch reports it in the main thread
                self.stopped.set()

    def _hear(self) -> None:
        found = self.store.get(KEY + str(self.neighbour)) if self._there(self.neighbour) else None
        self._answered = time.monotonic()
        text = None if found is None else found.decode()
        if text is None or text != self._text:
            self._text, self._changed = text, time.monotonic()

    def _note_stall(self, here: str) -> None:
        """Print where the other ranks are if this one is in one call for long; again after four times as long."""
        now = time.monotonic()
        if here != self._here:
            self._here, self._since, self._patience = here, now, self.seconds
        elif now - self._since > self._patience:
            self._patience *= 4
            seen = {rank: self.store.get(KEY + str(rank)) for rank in range(self.world) if self._there(rank)}
            others = {rank: json.loads(text)[0] for rank, text in seen.items() if rank != self.rank}
            elsewhere = [f"rank {rank} in {where}" for rank, where in others.items() if where != here]
            if elsewhere:
                print(
                    f"longctx: rank {self.rank} has been in {here} for {now - self._since:.0f} s; elsewhere: "
                    + "; ".join(elsewhere[:8]),
                    file=sys.stderr,
                    flush=True,
                )

    def _say(self, text: str, count: int) -> None:
        self.store.set(KEY + str(self.rank), json.dumps([text, count]))

    def _there(self, rank: int) -> bool:
        return bool(self.store.check([KEY + str(rank)]))

    def _watch(self) -> None:
        last = time.monotonic()
        while not self.stopped.wait(self.every / 2):
            now = time.monotonic()
            if now - last > max(5 * self.every, self.seconds / 4):
                # This process itself was stopped: restart both clocks.
                self._changed = self._answered = now
            last = now
            message = self.silence(now)
            if message is not None and not self.stopped.is_set():
                self.give_up(message)
                return

    def silence(self, now: float) -> str | None:
        """Return the error message if the neighbour or the store has been silent for too long at time ``now``."""
        if now - self._answered > self.seconds:
            where = json.loads(self._text)[0] if self._text and self.neighbour == 0 else None
            return self._frozen(_keeper_of_store(), now - self._answered, where)
        if self._text is None or now - self._changed <= self.seconds:
            return None
        where = json.loads(self._text)[0]
        return None if where == ENDED else self._frozen(f"rank {self.neighbour}", now - self._changed, where)

    def _frozen(self, who: str, seconds: float, where: str | None) -> str:
        seen = f" It was last seen in {where}." if where else ""
        return (
            f"{who} made no sign of life for {seconds:.0f} s: its process is frozen (stopped, swapped out, or its "
            f"host is gone).{seen} Rank {self.rank} waits in {call_site()}"
        )


_running: Heartbeat | None = None
_decided = False


def start_heartbeat(
    mesh: Mesh, seconds: float | None = None, give_up: Callable[[str], None] | None = None
) -> Heartbeat | None:
    """Start this rank's heartbeat, once per process; later calls return it. Uses the store only, no collective.

    Args:
        mesh: connected.
        seconds: without a heartbeat until a rank counts as frozen; 0 disables it. Default LONGCTX_FROZEN_SECONDS, else
            120.
        give_up: see ``Heartbeat``; by default it prints the message to stderr and exits with code 1.

    Returns:
        the heartbeat; None if it is disabled, the world has one rank, or the store is a file.

    Raises:
        EngineError: LONGCTX_FROZEN_SECONDS is not a number.
    """
    global _running, _decided
    if _decided and (_running is None or not _running.stopped.is_set()):
        return _running
    seconds = _limit() if seconds is None else seconds
    _decided, _running = True, None
    store = _own_connection(seconds) if seconds > 0 and mesh.world_size > 1 else None
    if store is not None:
        _running = Heartbeat(store, mesh.rank, mesh.world_size, seconds, give_up or _end)
        atexit.register(_running.stop)
        _running.start()
    return _running


def _limit() -> float:
    given = os.environ.get("LONGCTX_FROZEN_SECONDS", str(FROZEN_SECONDS))
    try:
        return float(given)
    except ValueError:
        raise EngineError(f"LONGCTX_FROZEN_SECONDS={given!r}: give a number of seconds, or 0 to turn it off") from None


def _keeper_of_store() -> str:
    by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return "torchrun's agent, which keeps the job's store," if by_launcher else "rank 0, which keeps the job's store,"


def call_site() -> str:
    """Return where this process is: phase of the loop, block of the ring, and innermost line of code."""
    frames = sys._current_frames()
    main = frames.pop(threading.main_thread().ident or 0, None)
    backward = [frame for frame in frames.values() if _in_attention(frame)]
    return describe(backward[0] if backward else main)  # on a GPU, autograd runs backward in another thread


def describe(frame: FrameType | None) -> str:
    """Return phase and line of the thread whose innermost frame is ``frame``."""
    if frame is None:
        return "an unknown place"
    phases: list[str] = []
    line = ""
    innermost, one = frame, frame
    while one is not None:
        name = str(one.f_globals.get("__name__", ""))
        if not line and (name == "__main__" or name.startswith("longctx.")):
            line = _line(one)
        phase = _phase(one, name)
        if phase and phase not in phases:
            phases.append(phase)
        one = one.f_back  # type: ignore[assignment]
    return f"{', '.join(reversed(phases)) or 'its own code'} ({line or _line(innermost)})"


def _phase(frame: FrameType, name: str) -> str | None:
    if name == "longctx.engine.engine":
        return _METHODS.get(frame.f_code.co_name)
    phase = next((text for part, text in _PHASES.items() if name == part or name.startswith(f"{part}.")), None)
    # `stage` is a local of Passes' loops over ring steps (a comment there says so).
    source = getattr(frame.f_locals.get("stage"), "source", None) if name == "longctx.attention.passes" else None
    return phase if source is None else f"{phase} at the block of ring member {source}"


def _line(frame: FrameType) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def _in_attention(frame: FrameType | None) -> bool:
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("longctx.attention"):
            return True
        frame = frame.f_back
    return False


def _own_connection(seconds: float) -> Any:
    """Return a connection to the job's store for this thread alone; None if the store is a file or in this process."""
    store: Any = dist.distributed_c10d._get_default_store()
    inner = store
    while hasattr(inner, "underlying_store"):
        inner = inner.underlying_store
    if not isinstance(inner, dist.TCPStore):
        return None
    own = store.clone()
    own.set_timeout(timedelta(seconds=max(4 * seconds, 60)))  # longer than our own limit
    return own


def _end(message: str) -> None:
    print(f"longctx: {message}", file=sys.stderr, flush=True)
    os._exit(1)

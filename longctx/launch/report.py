"""Error reports from ranks to their launcher, which prints the first cause only, once."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from longctx.errors import LongctxError
from longctx.train.signals import PREEMPTED, SIGNALS, sentence_of

FOLDER = "LONGCTX_ERROR_FOLDER"  # environment variable: where ranks leave their reports
_MARK = "=== longctx: a run starts here, "
LONGEST = 100_000  # characters; longer texts keep their end, which names the cause


def text_of(error: BaseException) -> str:
    """Return the text to print for an error: its message for a LongctxError, else the traceback."""
    if isinstance(error, LongctxError):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def leave(rank: int, error: BaseException) -> bool:
    """Write a report for the launcher; return False if there is no launcher of ours, or the write failed."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return False
    text, user = text_of(error)[-LONGEST:], isinstance(error, LongctxError)
    record = {"rank": rank, "time": time.time(), "user": user, "text": text}
    try:
        (Path(folder) / f"rank-{rank:05d}.json").write_text(json.dumps(record))
    except OSError:
        return False
    return True


def read(folder: Path, rank: int) -> dict[str, Any] | None:
    """Return a rank's report, or None if it left none."""
    try:
        record: dict[str, Any] = json.loads((folder / f"rank-{rank:05d}.json").read_text())
    except (OSError, ValueError):
        return None
    return record


def first_cause(folder: Path, exit_codes: dict[int, int | None], logs: Path) -> str:
    """Return the text to print about a failed job.

    Args:
        folder: the ranks' reports.
        exit_codes: by rank; negative for a signal, None for a rank that had not ended when the job was stopped.
        logs: the folder of log files, which the text names.
    """
    # a rank that ended without a report (killed, crashed in native code) is the cause of what others then report
    for rank, code in sorted(exit_codes.items()):
        silent = not (folder / f"rank-{rank:05d}.json").is_file()
        if silent and code is not None and code not in (0, 75):
            log = logs / f"rank-{rank:05d}.log"
            return f"rank {rank} {ended(code)}. The end of {log}:\n{tail(log)}"
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    if not records:
        return f"the ranks ended without an error report; see {logs}"
    record = min(records, key=lambda item: item["time"])
    if record["user"]:
        return str(record["text"])
    return f"rank {record['rank']} failed (full output in {logs}):\n{record['text']}"


def stopped(folder: Path, exit_codes: Collection[int], asked: int) -> str | None:
    """Return the text to print if a signal stopped the job before its first step; None if it ended in another way.

    Args:
        folder: the ranks' reports.
        exit_codes: of the ranks that have ended.
        asked: the signal that the launcher sent to the ranks; 0 for none.
    """
    answers = {130, 143, PREEMPTED, 0} | ({-number for number in SIGNALS} if asked else set())
    silent = asked and not list(folder.glob("rank-*.json"))  # a rank that was still importing leaves no report
    if not all(code in answers or (silent and code == 1) for code in exit_codes):
        return None
    if asked:
        return sentence_of(asked)
    records = [read(folder, int(path.stem.removeprefix("rank-"))) for path in sorted(folder.glob("rank-*.json"))]
    return next((str(record["text"]) for record in records if record), None)


def ended(code: int) -> str:
    """Return the words for a process that ended without a report."""
    hint = "; the system may be out of memory" if code == -signal.SIGKILL else ""
    return f"was killed by {_signal_name(-code)}{hint}" if code < 0 else f"ended with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def mark(log: BinaryIO) -> None:
    """Append a line to a log that separates this run from earlier ones."""
    log.write(f"{_MARK}{time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
    log.flush()


def tail(path: Path, lines: int = 30) -> str:
    """Return the last lines that this run wrote to a log."""
    try:
        found = path.read_text(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    last = max((number for number, line in enumerate(found) if line.startswith(_MARK)), default=-1)
    return "\n".join(found[last + 1 :][-lines:]) or "(nothing was written)"

"""Prefetch items of an iterator in a thread: bounded, in order; errors reach the consumer; can be stopped."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.1


class Prefetcher(Generic[T]):
    """Iterate ``source`` in a thread, at most ``depth`` items ahead of the consumer.

    An exception of the source is raised in the consumer, after the items before it. ``close`` (also called when the
    object is garbage-collected) ends the thread, which never keeps the process alive.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._items: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        # The thread must not hold a reference to self, or a dropped prefetcher would never be collected.
        self._thread = threading.Thread(
            target=_read, args=(source, self._items, self._stop), name="longctx-prefetch", daemon=True
        )
        self._end = weakref.finalize(self, self._stop.set)
        self._failed: BaseException | None = None
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._failed is not None:
            raise self._failed
        while True:
            try:
                kind, value = self._items.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._items.empty():  # closed, or killed with the interpreter
                    kind, value = "error", StopIteration()
                    break
        if kind == "error":
            self._failed = value
            raise value
        return value

    def close(self) -> None:
        """Stop reading and join the thread, which finishes its current item."""
        self._end()
        self._thread.join()


def _read(source: Iterator[Any], items: queue.Queue[Any], stop: threading.Event) -> None:
    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            try:
                items.put((kind, value), timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue

    try:
        while not stop.is_set():
            put("item", next(source))
    except BaseException as error:  # also StopIteration: raised in the consumer
        put("error", error)

"""The prefetch thread: in order, bounded, passes its errors on, and ends with its iterator."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator

import pytest

from longctx.data.loader import ShardedLoader
from longctx.data.prefetch import Prefetcher
from longctx.data.tokens.file import TokenFile
from longctx.errors import DataError

Make = Callable[..., TokenFile]


def reading_threads() -> int:
    return sum(thread.name == "longctx-prefetch" for thread in threading.enumerate())


def test_prefetch_is_bounded_ordered_and_stops() -> None:
    taken = 0

    def source() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    ahead = Prefetcher(source(), 2)
    assert [next(ahead) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert taken <= 5 + 2 + 2  # two waiting, one in hand, one being made
    ahead.close()
    assert reading_threads() == 0


def test_prefetch_hands_errors_on_in_their_place() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise DataError("here")

    ahead = Prefetcher(source(), 4)
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(DataError, match="here"):
            next(ahead)
    ahead.close()
    assert list(Prefetcher(iter([1, 2, 3]), 1)) == [1, 2, 3]


def test_dropped_loader_leaves_no_thread(make_tokens: Make) -> None:
    loader = ShardedLoader(make_tokens([4] * 100), 4, prefetch=2)
    next(loader)
    threads = [thread for thread in threading.enumerate() if thread.name == "longctx-prefetch"]
    assert len(threads) == 1
    loader.close()
    assert not threads[0].is_alive()
    next(loader)
    threads = [thread for thread in threading.enumerate() if thread.name == "longctx-prefetch"]
    del loader
    gc.collect()
    threads[0].join(5)
    assert not threads[0].is_alive()

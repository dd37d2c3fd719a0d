"""Keep one engine's mpu out of the next: DeepSpeed stores it in a global, ``deepspeed.utils.groups.mpu``.

An engine made later without an mpu would read the first one's sequence_parallel_size there and divide its gradients by
too little, silently. An engine reads the global only while it is made, so here it is set for that long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from longctx.errors import EngineError
from longctx.patched import patched


@contextmanager
def only_mpu(mpu: Any) -> Iterator[None]:
    """Let engines made in the block see ``mpu``, or none; afterwards the global is as it was. No communication."""
    from deepspeed.utils import groups

    with patched(groups, mpu=mpu):
        yield


def forget_mpu(mpu: Any) -> None:
    """Clear the global if it is ``mpu``, that of an engine which is made. No communication."""
    from deepspeed.utils import groups

    if mpu is not None and groups.mpu is mpu:
        groups.mpu = None


def stale_mpu() -> bool:
    """Return whether an engine made now without an mpu would take that of an earlier one. No communication."""
    import sys

    groups = sys.modules.get("deepspeed.utils.groups")
    return groups is not None and groups.mpu is not None


def check_own_size(engine: Any) -> None:
    """Raise if an engine took its number of sequence ranks from an earlier engine's mpu. No communication.

    Raises:
        EngineError: it was made without an mpu after one made with ``mpu=``.
    """
    if engine.mpu is None and engine.sequence_parallel_size != 1:
        raise EngineError(
            f"this engine was made without an mpu, but took sequence_parallel_size {engine.sequence_parallel_size} "
            "from an earlier engine of this process: pass mpu=mesh, or set deepspeed.utils.groups.mpu = None before "
            "making it"
        )

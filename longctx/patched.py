"""Replace attributes of a module or an object for the duration of a block, where a library leaves no other way in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    """Set ``owner``'s attributes to ``values`` within the block; afterwards restore them, or delete those that it only
    inherited or lacked."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)


@contextmanager
def patched_environ(**values: str) -> Iterator[None]:
    """Set environment variables within the block; afterwards restore them, or unset those that were not set."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

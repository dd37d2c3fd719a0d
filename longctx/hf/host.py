"""Host: the Trainer class behind the mixins of ``longctx.hf``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Host: Any
else:
    Host = object

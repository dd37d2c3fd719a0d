"""Choose the tokens per tile: few enough that intermediate results are small, enough to use the hardware well."""

from __future__ import annotations

from typing import Literal

import torch

from longctx.errors import ModelError

Tile = int | Literal["auto"]

# Elements that a tile's intermediate result may have. A GPU needs about a thousand rows per product; on a CPU smaller
# tiles, which suit its caches and allocator, are as fast.
_GPU, _CPU = 2**27, 2**23
_LEAST = 128


def choose_tile(tile: Tile, width: int, device: torch.device) -> int:
    """Return the tokens per tile for a widest intermediate result of ``width`` elements per token.

    The result does not depend on data: under ZeRO-3 all ranks must run the same collectives, so the same tiles.

    Args:
        tile: a number of tokens, or "auto".

    Raises:
        ModelError: ``tile`` is not a positive number.
    """
    if tile == "auto":
        return max(_LEAST, (_CPU if device.type == "cpu" else _GPU) // width // 16 * 16)
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ModelError(f"a tile of {tile!r} tokens: give a positive number, or 'auto'")
    return tile

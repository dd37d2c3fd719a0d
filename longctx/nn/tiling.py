"""How many tokens make a tile: few enough that its intermediate results are small, enough to keep the machine busy."""

from __future__ import annotations

from typing import Literal

import torch

from longctx.errors import ModelError

Tile = int | Literal["auto"]

# Numbers of intermediate results a tile may have. A GPU wants about a thousand rows in a product; a CPU is as fast with
# a tile that its caches and allocator like.
_GPU, _CPU = 2**27, 2**23
_LEAST = 128


def choose_tile(tile: Tile, width: int, device: torch.device) -> int:
    """Return the tokens of a tile whose widest intermediate result has ``width`` numbers a token.

    It depends on nothing that differs between ranks of one kind, above all not on their data: under ZeRO-3 they go
    through the same collectives.

    Args:
        tile: a number of tokens, or "auto".

    Raises:
        ModelError: not a positive number.
    """
    if tile == "auto":
        return max(_LEAST, (_CPU if device.type == "cpu" else _GPU) // width // 16 * 16)
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ModelError(f"a tile of {tile!r} tokens: give a positive number, or 'auto'")
    return tile

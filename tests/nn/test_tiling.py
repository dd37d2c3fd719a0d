"""How many tokens a tile has: bounded bytes, enough rows for the hardware, and nothing that depends on data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import ModelError
from longctx.nn.tiling import choose_tile

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@given(st.integers(1, 2**25), st.sampled_from([CPU, GPU]))
def test_the_automatic_tile_bounds_its_bytes(width: int, device: torch.device) -> None:
    tile = choose_tile("auto", width, device)
    assert tile >= 128 and tile % 16 == 0
    assert tile == 128 or tile * width <= (2**23 if device == CPU else 2**27)


def test_tiles_of_known_vocabularies() -> None:
    assert choose_tile("auto", 32_000, CPU) * 32_000 * 4 <= 32 * 2**20
    assert choose_tile("auto", 128_256, GPU) == 1040
    assert choose_tile("auto", 2**24, CPU) == 128


@pytest.mark.parametrize("tile", [0, -3, 2.5, "all", True, None])
def test_other_tiles_are_refused(tile: Any) -> None:
    with pytest.raises(ModelError, match="positive number"):
        choose_tile(tile, 100, CPU)
    assert choose_tile(7, 100, CPU) == 7

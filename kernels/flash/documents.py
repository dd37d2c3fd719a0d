"""Narrow a block table by document ids, on the device: two small launches per pass and no copy to the host.

Of the tiles that the index rule leaves, a tile of rows keeps the range that holds every tile whose ids overlap its own,
and needs no mask if both tiles are of one document. If ids grow along a span, as in a packed batch, the range is exact;
otherwise it is a superset, and the mask in the kernel decides.
"""

from __future__ import annotations

import torch

from .document_kernels import extents_kernel, narrow_kernel
from .launch import Launch
from .tables import RANGE, Geometry, Table


def narrow(table: Table, geometry: Geometry, rows: torch.Tensor, cols: torch.Tensor, tile: int, step: int) -> Table:
    """Return the table with ranges per batch row, (B, row tiles, column spans, RANGE).

    Args:
        rows (B, T), cols (B, T'): document ids of the table's rows and columns, any integer dtype, dense.
    """
    batch, spans = rows.shape[0], len(geometry.cols)
    tiles = max(-(-side.valid // step) for side in geometry.cols)
    if not table.tiles or not tiles:
        return table
    extents = torch.empty((batch, spans, tiles, 3), dtype=torch.int64, device=rows.device)
    counts = {"spans": spans, "tiles": tiles, "extents": extents, "ranges": table.ranges}
    measure = {"ids": cols, "length": cols.shape[1], "COLS": step, **counts}
    Launch(extents_kernel, (tiles, spans, batch), measure).run()
    narrowed = torch.empty((batch, table.tiles, spans, RANGE), dtype=torch.int32, device=rows.device)
    choose = {"ids": rows, "length": rows.shape[1], "headers": table.headers, "row_tiles": table.tiles, **counts}
    Launch(
        narrow_kernel, (table.tiles, spans, batch), {**choose, "narrowed": narrowed, "ROWS": tile, "SCAN": 128}
    ).run()
    return Table(table.headers, narrowed)

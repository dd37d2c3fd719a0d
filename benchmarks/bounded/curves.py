"""Loss by position on held-out documents: what a model gains from a longer context."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from longctx.data.build import open_build
from longctx.data.tokens.file import TokenFile
from longctx.models.load.pretrained import load_pretrained

BINS = 32


def held_out_rows(tokens: Path, length: int, count: int) -> torch.Tensor:
    """Return up to ``count`` rows (R, length + 1) int64, each from within one held-out document.

    Documents are taken in turns, so that a long one does not dominate.
    """
    folders = [path.parent for path in sorted(tokens.rglob("build.json"))] or [tokens]
    build = open_build(folders[0])
    assert build.held_out is not None
    found: list[tuple[int, torch.Tensor]] = []
    with TokenFile(Path(build.held_out)) as file:
        for number in range(file.document_count):
            document = torch.from_numpy(file.document(number).astype("int64"))
            pieces = document.unfold(0, length + 1, length + 1) if len(document) > length else document[:0, None]
            found += list(enumerate(pieces))
    found.sort(key=lambda piece: piece[0])
    if not found:
        raise SystemExit(f"no held-out document has more than {length} tokens; lower data.sequence_length")
    return torch.stack([row for _, row in found[:count]])


def losses_by_position(model_folder: Path, tokens: Path, length: int, count: int) -> list[float]:
    """Return the mean loss in ``BINS`` equal bins of the first ``length`` positions; one process, CPU."""
    rows = held_out_rows(tokens, length, count)
    model = load_pretrained(model_folder).eval()
    total = torch.zeros(length, dtype=torch.float64)
    with torch.no_grad():
        for row in rows:
            logits = model(row[None, :-1], use_cache=False).logits[0]
            total += F.cross_entropy(logits.float(), row[1:], reduction="none").double()
    mean = total / len(rows)
    return [float(part.mean()) for part in mean.tensor_split(min(BINS, length))]

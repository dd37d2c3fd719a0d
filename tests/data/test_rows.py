"""Labels of packed rows: an ignored token is read as usual and is never a target, in any shard of any packing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longctx.data.loader import ShardedLoader
from longctx.data.rows import PackedRows
from longctx.data.tokens.file import TokenFile
from longctx.data.tokens.writer import TokenWriter
from longctx.mesh import Mesh

LENGTHS = [5, 1, 12, 3, 30, 2, 7]


@pytest.fixture
def masked(tmp_path: Path) -> tuple[TokenFile, np.ndarray]:
    """A file whose token n is n, and (N,) bool: whether the loss counts token n."""
    labels = np.random.default_rng(1).random(sum(LENGTHS)) < 0.5
    with TokenWriter(tmp_path / "x", vocabulary_size=100, tokenizer_hash="ab" * 32) as writer:
        for begin, length in zip(np.cumsum([0, *LENGTHS]), LENGTHS, strict=False):
            writer.append(np.arange(begin, begin + length), labels=labels[begin : begin + length])
            writer.end_document()
    return TokenFile(tmp_path / "x"), labels


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_counted_token_is_a_target_once(masked: tuple[TokenFile, np.ndarray], packing: str) -> None:
    file, labels = masked
    rows = PackedRows(file, 8, packing)
    parts = [rows.read(row, np.arange(8)) for row in range(len(rows))]
    found = np.concatenate([part.labels for part in parts])
    firsts = set(file.offsets[:-1].tolist())
    assert sorted(found[found >= 0].tolist()) == [n for n in np.flatnonzero(labels).tolist() if n not in firsts]
    read = np.concatenate([part.input_ids[part.document_ids >= 0] for part in parts])
    assert sorted(read.tolist()) == list(range(file.token_count))


def test_a_shard_has_the_labels_of_the_row(masked: tuple[TokenFile, np.ndarray]) -> None:
    file, _ = masked
    whole = next(ShardedLoader(file, 8, micro_batch=2, prefetch=0, layout="contiguous"))[0]["labels"]
    shards = []
    for rank in range(4):
        mesh = Mesh(4, 1, 1, world_size=4, rank=rank)
        shards.append(
            next(ShardedLoader(file, 8, micro_batch=2, mesh=mesh, prefetch=0, layout="contiguous"))[0]["labels"]
        )
    assert np.array_equal(np.concatenate(shards, axis=1), whole)

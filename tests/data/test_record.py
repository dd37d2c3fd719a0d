"""A run resumes only with the data its checkpoints count: other data are refused by key, before any write."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.data.build import build_tokens, open_build
from longctx.errors import DataError


def test_only_the_data_of_the_checkpoints_are_built(corpus: Path, tmp_path: Path) -> None:
    first = build_tokens(corpus, "bytes", tmp_path / "out")

    def refused(**changes: object) -> str:
        with pytest.raises(DataError) as caught:
            build_tokens(**{"sources": corpus, "tokenizer": "bytes", "out_folder": tmp_path / "out", **changes},
                         continues=first.record)  # fmt: skip
        assert open_build(tmp_path / "out").record == first.record, "overwritten although it was refused"
        return str(caught.value)

    assert "data.seed: the checkpoints of this run were saved with data.seed 0, this run has 5" in refused(seed=5)
    assert "saved with data.held_out 0.01, this run has 0.2: set it back" in refused(held_out=0.2)
    assert "data.tokenizer: the checkpoints" in refused(tokenizer="bpe", vocabulary_size=300)
    assert "data.exclude was [], now ['0*']" in refused(exclude=["0*"])
    moved = corpus.rename(tmp_path / "moved")
    assert build_tokens(moved, "bytes", tmp_path / "again", continues=first.record).record["key"] == first.record["key"]
    (moved / "new.txt").write_text("another text")
    assert "not the one that the checkpoints of this run were trained on" in refused(sources=moved)
    moved.rename(corpus)
    assert "files were changed, added or removed" in refused()

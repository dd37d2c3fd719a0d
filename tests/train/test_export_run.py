"""What `longctx export` rejects; tests/train/test_export.py exports real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.errors import CheckpointError, ConfigError
from longctx.train.checkpoint import export_run as module
from longctx.train.checkpoint.export_run import export_run


def test_mistakes_are_found_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="export --dtype int8: choose one of fp32, bf16, fp16"):
        export_run(tmp_path, dtype="int8")
    with pytest.raises(ConfigError, match="exists already and is left alone"):
        export_run(tmp_path, output=tmp_path)
    with pytest.raises(ConfigError, match="no config.yaml there"):
        export_run(tmp_path)


def test_missing_and_invalid_checkpoints_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in .*, which holds nothing"):
        module._checkpoint(tmp_path, None)
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint of step 4 in .*, which holds step-00000003"):
        module._checkpoint(tmp_path, 4)
    with pytest.raises(CheckpointError, match="is valid: .*damaged"):
        module._checkpoint(tmp_path, None)

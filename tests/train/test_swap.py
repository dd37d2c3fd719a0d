"""The NVMe folder of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longctx.errors import ConfigError
from longctx.train.checkpoint import swap


def config(offload: str) -> Any:
    return SimpleNamespace(zero=SimpleNamespace(offload_optimizer=offload))


def test_it_is_empty_at_the_start_and_deleted_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, problems = tmp_path / "run", []
    monkeypatch.setattr(swap.nvme, "run_folder", lambda config: folder)
    monkeypatch.setattr(swap.nvme, "missing", lambda config, share: problems)
    monkeypatch.setattr(swap.nvme, "writes_directly", lambda folder: True)
    monkeypatch.setattr(swap, "ranks_per_host", lambda config, world: 1)
    with swap.swap_folder(config("none")):
        assert not folder.exists()
    (folder / "left").mkdir(parents=True)  # by a run that was killed
    with swap.swap_folder(config("nvme")):
        assert list(folder.iterdir()) == []
        (folder / "zero_stage_3" / "optimizer" / "rank0").mkdir(parents=True)
    assert not folder.exists()
    monkeypatch.setattr(swap.nvme, "writes_directly", lambda folder: False)
    with pytest.raises(ConfigError, match="without O_DIRECT"), swap.swap_folder(config("nvme")):
        pass
    problems.append(("zero.nvme_folder", "has no room"))
    with pytest.raises(ConfigError, match="has no room"), swap.swap_folder(config("nvme")):
        pass

"""Random states survive a round trip through JSON."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy
import pytest
import torch

from longctx.errors import CheckpointError
from longctx.train.checkpoint import rng


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(numpy.random.rand()),
        float(torch.rand(1)),
        float(torch.randn(1)),
    ]


def test_random_states_come_back_from_json(tmp_path: Path) -> None:
    random.gauss(0, 1), numpy.random.randn()  # both keep a second number for later
    rng.save(tmp_path, 3)
    first = draw()
    rng.load(tmp_path, 3)
    assert draw() == first
    (tmp_path / rng.name_of(3)).write_text(json.dumps({**rng.capture(), "torch": "00"}))
    with pytest.raises(CheckpointError, match="random state"):
        rng.load(tmp_path, 3)

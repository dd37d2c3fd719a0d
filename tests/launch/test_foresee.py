"""Stages that are predicted not to fit this machine's GPUs are named before the ranks start."""

from __future__ import annotations

import pytest

from longctx.config.derived import derive
from longctx.config.load import loads
from longctx.launch import foresee, hardware

YAML = """
model: {architecture: llama, hidden_size: 1024, layers: 4, heads: 8, vocab_size: 8192, dtype: bf16}
mesh: {ring: 2, data: 1}
data: {sources: python-stdlib}
train:
  stages:
    - {sequence_length: 8Ki, steps: 100, global_batch: 8}
    - {sequence_length: 512Ki, steps: 10}
zero: {stage: 3}
output: {folder: runs/stages}
"""


def test_a_stage_too_large_for_the_gpus_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config = loads(YAML).config
    sizes = derive(config, 2)
    assert foresee.too_large(config, sizes) == []
    monkeypatch.setattr(hardware, "gpu_bytes", lambda: 6 * 2**30)
    (said,) = foresee.too_large(config, sizes)
    assert said.startswith("train.stages[1]: rows of 524,288 tokens are predicted to need") and "has 6.0;" in said
    monkeypatch.setattr(hardware, "gpu_bytes", lambda: 2**50)
    assert foresee.too_large(config, sizes) == []

"""What this machine can compute in is known before any rank starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.errors import LaunchError
from longctx.launch import hardware


def test_fp16_needs_a_gpu_or_a_cpu_with_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: 0)
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: ["avx2"])
    hardware.require_dtype("bf16")
    with pytest.raises(LaunchError, match="model.dtype: fp16.*use bf16 or fp32"):
        hardware.require_dtype("fp16")
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: ["avx2", "avx512_fp16"])
    hardware.require_dtype("fp16")
    monkeypatch.setattr(hardware, "gpus", lambda: 1)
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: [])
    hardware.require_dtype("fp16")


def test_the_smallest_gpus_memory_is_asked_of_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '81559\\n24576\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.gpu_bytes() is None
    monkeypatch.setattr(hardware, "gpus", lambda: 2)
    assert hardware.gpu_bytes() == 24576 * 2**20

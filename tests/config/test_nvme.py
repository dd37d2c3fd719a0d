"""Swapping to NVMe: what a machine must have for it is named before anything starts, and runs do not share a folder."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from config_samples import load_variant, text_of, variant

from longctx.config import nvme
from longctx.config.deepspeed import to_deepspeed
from longctx.config.load import loads, require_machine
from longctx.config.problems import InvalidConfig
from longctx.config.schema import RunConfig
from longctx.errors import ConfigError
from longctx.train.checkpoint.swap import swap_folder


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "has_libaio", lambda: True)


def changes(folder: Path, output: str = "/tmp/run") -> dict[str, Any]:
    return {
        "zero__stage": 3,
        "zero__offload_optimizer": "nvme",
        "zero__nvme_folder": str(folder),
        "output__folder": output,
    }


def swapping(folder: Path, output: str = "/tmp/run") -> RunConfig:
    return load_variant(**changes(folder, output)).config


def problem_with(folder: Path) -> Any:
    with pytest.raises(InvalidConfig) as caught:
        require_machine(loads(text_of(variant(**changes(folder)))))
    (problem,) = caught.value.problems
    return problem


def test_a_good_folder_passes_and_is_left_as_it_is(tmp_path: Path) -> None:
    require_machine(loads(text_of(variant(**changes(tmp_path)))))
    assert not list(tmp_path.iterdir())


def test_folders_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for bad in ("none", "file"):
        found = problem_with(tmp_path / bad)
        assert found.key == "zero.nvme_folder" and repr(str(tmp_path / bad)) in found.message
    with monkeypatch.context() as patch:
        patch.setattr(nvme.os, "access", lambda path, mode: path != tmp_path)
        assert "cannot be written to" in problem_with(tmp_path).message
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(9, 8, 1000) if path == tmp_path else real(path))
    found = problem_with(tmp_path)
    assert found.key == "zero.nvme_folder" and "0.0 GiB free" in found.message and "parameters need" in found.message


def test_without_libaio_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "has_libaio", lambda: False)
    found = problem_with(tmp_path)
    assert found.key == "zero.offload_optimizer" and "apt install libaio-dev" in found.message


def test_libaio_is_looked_for_as_deepspeed_does(libaio: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    commands = []

    def compiler(code: int) -> Callable[..., Any]:
        def run(command: list[str], **options: Any) -> Any:
            commands.append(command)
            return subprocess.CompletedProcess(command, code)

        return run

    monkeypatch.setenv("LDFLAGS", "-L/opt/aio")
    for code, found in ((0, True), (1, False)):
        monkeypatch.setattr(nvme.subprocess, "run", compiler(code))
        assert nvme.has_libaio() is found
    assert all("-laio" in command and "-L/opt/aio" in command for command in commands)
    monkeypatch.setattr(nvme.shutil, "which", lambda name: None)
    assert nvme.has_libaio() is False


def test_every_output_folder_has_a_swap_folder_of_its_own(tmp_path: Path) -> None:
    one, same, other = (swapping(tmp_path, output) for output in ("/tmp/one", "/tmp/one", "/tmp/other"))
    assert nvme.run_folder(one) == nvme.run_folder(same) != nvme.run_folder(other)
    section = to_deepspeed(one)["zero_optimization"]
    assert section["offload_optimizer"] == {"device": "nvme", "nvme_path": str(nvme.run_folder(one))}
    assert section["sub_group_size"] == nvme.SUB_GROUP


def test_the_folder_is_empty_at_the_start_and_gone_at_the_end(tmp_path: Path) -> None:
    config, stranger = swapping(tmp_path), tmp_path / "longctx-another"
    folder = nvme.run_folder(config)
    left = folder / "zero_stage_3" / "optimizer" / "rank0" / "7.tensor.swp"
    left.parent.mkdir(parents=True), stranger.mkdir()
    left.touch()
    with pytest.raises(KeyError), swap_folder(config):
        assert folder.is_dir() and not left.exists()
        left.parent.mkdir(parents=True)
        left.touch()
        raise KeyError("a crash")
    assert list(tmp_path.iterdir()) == [stranger]
    with swap_folder(load_variant().config):
        assert list(tmp_path.iterdir()) == [stranger]


def test_every_host_looks_for_itself_before_anything_heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ConfigError, match=r"zero\.nvme_folder: .* is not a folder here"),
        swap_folder(swapping(tmp_path / "none")),
    ):
        pass
    monkeypatch.setattr(nvme, "writes_directly", lambda folder: False)
    with pytest.raises(ConfigError, match="without O_DIRECT"), swap_folder(swapping(tmp_path)):
        pass

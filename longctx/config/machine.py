"""Check that this machine has what a configuration needs: files, a writable folder, disk space, packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from longctx.config import nvme
from longctx.config.architecture import parameter_count
from longctx.config.findings import Finding, Rule, judge
from longctx.config.hosts import parse_hostfile, require_users
from longctx.config.lora import trained_parameters
from longctx.config.pretrained import FOLDER_RULES
from longctx.config.schema import RunConfig
from longctx.config.stages import judge_run
from longctx.data.sources.folder import would_read
from longctx.errors import LaunchError

_SPECIAL_SOURCES = ("python-stdlib",)


class Report(NamedTuple):
    """Findings, which stop a run, and notes, which do not."""

    findings: list[Finding]
    notes: list[str]


def inspect(config: RunConfig, starting: bool) -> Report:
    """Check that this machine has everything that ``config`` needs. Nothing is created or changed.

    Args:
        config: the configuration to check.
        starting: the run starts here and now; otherwise a disk too small for it is only a note, as the run may be
            meant for another machine.
    """
    notes: list[str] = []
    rules: list[Rule] = [_sources, _own_files, *FOLDER_RULES, _folder, _resume, _hostfile, _nvme, _tensorboard]
    findings = judge_run([*rules, _disk] if starting else rules, config)
    if not starting:
        notes += [finding.message for finding in judge([_disk], config)]
    return Report(findings, [*_missing_plot(config), *notes])


def token_folder(config: RunConfig) -> Path:
    """Return where this run's token files are."""
    return Path(config.data.folder) if config.data.folder else Path(config.output.folder) / "tokens"


def _sources(config: RunConfig) -> Iterator[Finding]:
    for source in config.data.sources:
        if source in _SPECIAL_SOURCES or "://" in source or not source.strip():  # rules report the last two
            continue
        if source.startswith("hf:"):
            if not _installed("datasets"):
                message = f"{source!r} needs the package datasets: pip install 'longctx[data]', or give text files"
                yield Finding("data.sources", message, "missing-package")
            continue
        path = Path(source)
        if not _exists(path) and not _exists(Path(f"{source}.idx")):  # NAME of Megatron's NAME.idx
            message = f"{source!r} does not exist; give text files, .jsonl files, folders, or python-stdlib"
            yield Finding("data.sources", message, "no-file")
        elif _exists(path) and not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            yield Finding("data.sources", f"{source!r} cannot be read; change its permissions", "no-access")
        elif path.is_file() and path.stat().st_size == 0:
            yield Finding("data.sources", f"{source!r} is empty; give a file with text", "empty-file")


def _own_files(config: RunConfig) -> Iterator[Finding]:
    """Report folders of the run inside a source: their files would become text."""
    for source in config.data.sources:
        if _exists(Path(source) / "build.json"):  # token files are used as they are
            continue
        for key, folder in (("output.folder", config.output.folder), ("data.folder", str(token_folder(config)))):
            if _is_dir(Path(source)) and would_read(source, Path(folder), config.data.exclude):
                message = (
                    f"{folder!r} is inside data.sources {source!r}, so the run's own files would become text; give a "
                    "folder outside, or name it in data.exclude"
                )
                yield Finding(key, message, "own-files")
                break


def _folder(config: RunConfig) -> Iterator[Finding]:
    folder = Path(config.output.folder).absolute()
    parent = next((path for path in (folder, *folder.parents) if _exists(path)), Path("/"))
    if not _is_dir(parent):
        yield Finding("output.folder", f"{str(parent)!r} is a file, not a folder; give another folder", "no-access")
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield Finding("output.folder", f"{str(parent)!r} cannot be written to; give another folder", "no-access")


def _disk(config: RunConfig) -> Iterator[Finding]:
    folder = Path(config.output.folder).absolute()
    parent = next((path for path in (folder, *folder.parents) if _is_dir(path)), Path("/"))
    free, needed = shutil.disk_usage(parent).free, disk_needed(config)
    if needed is None or free >= needed:
        return
    message = (
        f"{_gib(free)} free at {str(parent)!r}, but {config.checkpoint.keep} + 1 checkpoints need about "
        f"{_gib(needed)}; free space, lower checkpoint.keep, or give another folder"
    )
    yield Finding("output.folder", message, "disk")


def disk_needed(config: RunConfig) -> int | None:
    """Return the approximate bytes of a run's checkpoints, including one being written; None if unknown."""
    parameters = trained_parameters(config) or parameter_count(config)
    if parameters is None:
        return None
    optimizer = {"adamw": 8, "sgd": 4 if config.train.momentum else 0}[config.train.optimizer]
    weights = 4 if config.model.dtype == "fp32" else 2 + 4
    return parameters * (weights + optimizer) * (config.checkpoint.keep + 1)


def _resume(config: RunConfig) -> Iterator[Finding]:
    folder = Path(config.output.folder) / "checkpoints"
    if config.checkpoint.resume == "must" and not (_is_dir(folder) and any(folder.iterdir())):
        message = f"got 'must', but {str(folder)!r} holds no checkpoint; use auto, or give the run's output.folder"
        yield Finding("checkpoint.resume", message, "no-file")


def _hostfile(config: RunConfig) -> Iterator[Finding]:
    name = config.launch.hostfile
    if name is None:
        return
    try:
        hosts = parse_hostfile(Path(name).read_text(encoding="utf-8"))
        require_users(hosts, config.launch.launcher)
    except (OSError, UnicodeDecodeError):
        yield Finding("launch.hostfile", f"{name!r} cannot be read; a line is `name slots=4`", "no-file")
    except LaunchError as error:
        yield Finding("launch.hostfile", f"{name!r}, {error}", "name")


def _nvme(config: RunConfig) -> Iterator[Finding]:
    if config.launch.hostfile is None:  # otherwise each host checks itself at its start
        for key, message in nvme.missing(config):
            yield Finding(key, message, "nvme")


def _tensorboard(config: RunConfig) -> Iterator[Finding]:
    if config.output.tensorboard and not _installed("tensorboard"):
        message = "got true, but tensorboard is not installed: pip install 'longctx[tensorboard]', or write false"
        yield Finding("output.tensorboard", message, "missing-package")


def _missing_plot(config: RunConfig) -> list[str]:
    """Return a note if a plot is requested that cannot be drawn."""
    if _installed("matplotlib") or "plot" not in vars(config.output) or not config.output.plot:
        return []
    return ["matplotlib is not installed, so there will be no loss.png: pip install 'longctx[plot]'"]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # for example, a name that is too long
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"

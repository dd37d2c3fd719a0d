"""What a run needs of the machine is looked for before anything starts, and named with its line."""

from __future__ import annotations

import shutil
from typing import Any, NamedTuple

import pytest
from config_samples import BASE, text_of, variant

from longctx.config import machine
from longctx.config.load import loads, require_machine
from longctx.config.problems import InvalidConfig


def refused(starting: bool = True, **changes: Any) -> tuple[str, str]:
    """Return (key, code) of the one problem that this machine has with a variant."""
    loaded = loads(text_of(variant(**changes)), name="run.yaml")
    with pytest.raises(InvalidConfig) as caught:
        require_machine(loaded, starting)
    (problem,) = caught.value.problems
    return problem.key, problem.code


def test_a_good_one_passes(tmp_path):
    assert require_machine(loads(text_of(variant(output__folder=str(tmp_path / "new" / "run"))))) == []
    assert not (tmp_path / "new").exists()


def test_sources(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "link.txt").symlink_to("nowhere")
    for name, code in {"none.txt": "no-file", "empty.txt": "empty-file", "link.txt": "no-file"}.items():
        assert refused(data__sources=[str(tmp_path / name)]) == ("data.sources", code)
    assert refused(data__sources=["x" * 5000]) == ("data.sources", "no-file")


def test_a_folder_of_ours_inside_a_source_is_refused(tmp_path):
    text, run = tmp_path / "text", str(tmp_path / "text" / "runs" / "a")
    text.mkdir()
    sources = {"data__sources": [str(text)]}
    assert refused(**sources, output__folder=run) == ("output.folder", "own-files")
    assert refused(**sources, data__folder=run) == ("data.folder", "own-files")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "build.json").touch()
    built = variant(data__sources=[str(tmp_path / "tokens")], output__folder=str(tmp_path))
    assert require_machine(loads(text_of(built))) == []
    for changes in ({"data__exclude": ["runs"]}, {"output__folder": str(text / ".runs" / "a")}):
        assert require_machine(loads(text_of(variant(**{**sources, "output__folder": run, **changes})))) == []


def test_tokenizer(tmp_path):
    for name in (str(tmp_path / "none.json"), str(tmp_path)):
        assert refused(data__tokenizer=name, data__vocab_size=...) == ("data.tokenizer", "no-file")


def test_output(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert refused(output__folder=str(tmp_path / "file")) == ("output.folder", "no-access")
    assert refused(output__folder=str(tmp_path / "file" / "below"))[0] == "output.folder"
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert refused(output__folder=str(tmp_path / "new")) == ("output.folder", "no-access")


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_stops_a_start_and_is_a_note_of_check(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10, 9, 1000))
    assert refused(output__folder=str(tmp_path)) == ("output.folder", "disk")
    notes = require_machine(loads(text_of(variant(output__folder=str(tmp_path)))), starting=False)
    assert len(notes) == 1 and "free" in notes[0]


def test_resume_must_finds_nothing(tmp_path):
    assert refused(checkpoint__resume="must", output__folder=str(tmp_path)) == ("checkpoint.resume", "no-file")


def test_missing_packages(monkeypatch):
    monkeypatch.setattr(machine, "_installed", lambda package: False)
    assert refused(output__tensorboard=True) == ("output.tensorboard", "missing-package")
    assert refused(data__sources=["hf:name"]) == ("data.sources", "missing-package")
    notes = require_machine(loads(text_of(BASE)))
    assert any("matplotlib" in note for note in notes)

"""`longctx init`: what it is asked for, and what it refuses. tests/plan/test_propose.py has what --model proposes."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run
from pretrained_folders import pretrained_folder

from longctx.config.presets import render


def test_a_preset_is_written_once(tmp_path: Path) -> None:
    assert run("init").stdout == render("cpu-tiny")
    path = tmp_path / "run.yaml"
    assert run("init", "--output", path, "--preset", "1-gpu-32k").returncode == 0
    assert path.read_text() == render("1-gpu-32k")
    again = run("init", path)
    assert again.returncode == 2 and "already exists and is left alone" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.yaml", "--output", "b.yaml"), "both name the file; give one of them"),
        (("--preset", "cpu-tiny", "--model", "MODEL"), "are two starts; give one of them"),
        (("--model", "MODEL", "--length", "12x"), "expected a whole number of tokens, such as 131072 or 128Ki"),
        (("--model", "MODEL", "--machine", "h900"), "unknown; choose one of a100"),
        (("--preset", "none"), "there is no such preset"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    folder = str(pretrained_folder(tmp_path / "m"))
    done = run("init", *(folder if word == "MODEL" else word for word in arguments))
    assert done.returncode == 2 and message in done.stderr

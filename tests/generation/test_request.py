"""A request is checked where it is made, travels as JSON, and finds its model's folder."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import ConfigError
from longctx.generation.request import Request, model_folder


def test_what_is_written_is_read_by_this_user_alone(tmp_path: Path) -> None:
    request = Request("folder", "Grüße", temperature=0.0, beams=3)
    request.write(tmp_path / "request")
    assert Request.read(tmp_path / "request") == request
    assert stat.S_IMODE((tmp_path / "request").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0: give a number from 1"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"beams": 0}, "--beams 0"),
        ({"seed": -1}, "--seed -1"),
        ({"attention": "ring"}, "--attention ring: choose one of auto, el, kv"),
        ({"prompt": "a\udcff"}, "not UTF-8 text at its character 2"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Request(**{"folder": "folder", "prompt": "x"} | options)


def test_the_model_is_found_in_a_folder_or_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config.json there"):
        model_folder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="this run has not ended"):
        model_folder(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert model_folder(tmp_path) == tmp_path / "model"
    (tmp_path / "config.json").touch()
    assert model_folder(tmp_path) == tmp_path

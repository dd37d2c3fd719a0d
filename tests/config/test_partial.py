"""All mistakes of a configuration come at once: of the file, between its keys, and of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_samples import BASE, problems_of, text_of, variant
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from longctx.cli.main import app
from longctx.config.keys import leaves
from longctx.config.load import load_for_machine
from longctx.config.partial import STAND_INS, partial_config
from longctx.config.problems import InvalidConfig

SEVEN: dict[str, Any] = {
    "model__kv_heads": 3,  # does not divide heads
    "model__dtype": "fp64",
    "attention__layout": "zig-zag",
    "data__sequence_length": "many",
    "train__warmup_steps": 1000,  # above train.steps
    "train__lr": "fast",
    "zero__stage": 7,
}


def test_mistakes_of_values_and_between_keys_come_together(tmp_path: Path) -> None:
    wrong = variant(**SEVEN, data__sources=[str(tmp_path / "none.txt")])
    path = tmp_path / "run.yaml"
    path.write_text(text_of(wrong))
    with pytest.raises(InvalidConfig) as caught:
        load_for_machine(path)
    expected = {name.replace("__", ".") for name in SEVEN} | {"data.sources"}
    assert {problem.key for problem in caught.value.problems} == expected
    lines = [problem.place.line for problem in caught.value.problems]
    assert lines == sorted(lines) and all(lines)


def test_mending_all_of_them_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text_of(variant(output__folder=str(tmp_path / "run"))))
    load_for_machine(path)


def test_the_command_prints_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text_of(variant(**SEVEN, data__sources=[str(tmp_path / "none.txt")])))
    done = CliRunner().invoke(app, ["check", str(path)])
    assert isinstance(done.exception, InvalidConfig) and len(done.exception.problems) == 8


@pytest.mark.parametrize("key", [key for key in leaves() if key.partition(".")[2]])
def test_one_wrong_value_is_one_problem(key: str) -> None:
    """No rule speaks of the value that stands in for a wrong one."""
    section, _, name = key.partition(".")
    found = problems_of(text_of(variant(**{f"{section}__{name}": {"a": [1]}})) if not leaves()[key].raw else "a: 1\n")
    assert leaves()[key].raw or [problem.key for problem in found.problems] == [key], found


def test_every_required_key_has_a_stand_in() -> None:
    assert set(STAND_INS) == {key for key, leaf in leaves().items() if leaf.required}
    config, unknown = partial_config({})
    assert config is not None and {"model", "data", "train", "output"} <= unknown


@given(
    st.dictionaries(
        st.sampled_from([*BASE, "deepspeed", "other"]),
        st.none() | st.integers() | st.lists(st.integers(), max_size=2)
        | st.dictionaries(st.sampled_from([key.partition(".")[2] for key in leaves()]), st.integers() | st.text()),
    )
)  # fmt: skip
def test_whatever_is_wrong_something_is_left(tree: dict[str, Any]) -> None:
    config, _ = partial_config({key: value for key, value in tree.items() if key != "other"})
    assert config is not None

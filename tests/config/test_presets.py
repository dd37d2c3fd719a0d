"""The files of configs/: presets are regenerated from the code, hold only what they set, and all of them are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.config.fields import Section
from longctx.config.keys import leaves, sections
from longctx.config.load import load, loads
from longctx.config.presets import PRESETS, render
from longctx.config.reference import reference
from longctx.config.strict_yaml import parse

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KEYS = {key.rpartition(".")[2] for key in leaves()}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_stand_in_configs(name: str) -> None:
    path = CONFIGS / PRESETS[name].file
    assert path.read_text() == render(name), "regenerate it: longctx init --preset"
    config = load(path)
    for key, value in PRESETS[name].values.items():
        section, _, leaf = key.partition(".")
        found = getattr(config, section)
        given = getattr(found, leaf) if leaf else found
        assert (given.model_dump(exclude_none=True) if isinstance(given, Section) else given) == value


def test_every_file_in_configs_is_valid() -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert {"quickstart.yaml", "smoke.yaml"} <= {path.name for path in files}
    for path in files:
        load(path)


@pytest.mark.parametrize("name", PRESETS)
def test_every_commented_line_of_a_template_can_be_switched_on(name: str) -> None:
    text = "\n".join(
        line.replace("# ", "", 1)
        if line.strip().startswith("# ") and line.strip()[2:].partition(":")[0] in KEYS
        else line
        for line in render(name, full=True).splitlines()
    )
    document = parse(text, "")
    given = {f"{section}.{key}" for section, block in document.value.items() if section in sections() for key in block}
    assert given | {"deepspeed"} == set(leaves()) and not document.problems
    assert loads(text).config == loads(render(name)).config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_only_what_it_sets(name: str) -> None:
    values = parse(render(name), "").value
    given = {f"{section}.{key}" for section, block in values.items() if section in sections() for key in block}
    assert given | ({"deepspeed"} & set(values)) == set(PRESETS[name].values)


def test_the_reference_is_up_to_date() -> None:
    assert (CONFIGS / "README.md").read_text() == reference(), (
        "run: python -m longctx.config.reference > configs/README.md"
    )

"""What is written can be read: dumps, templates, presets, the reference, the JSON schema, explanations."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_samples import BASE, load_variant, text_of, variant
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config.explain import explain
from longctx.config.fields import Section
from longctx.config.keys import expected, leaves, sections
from longctx.config.load import load, loads
from longctx.config.presets import PRESETS, render
from longctx.config.reference import reference
from longctx.config.schema import RunConfig
from longctx.config.strict_yaml import parse
from longctx.config.write import dump, scalar
from longctx.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**18), 10**18)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1, max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    )
)
def test_any_value_is_read_back(value: object):
    document = parse(f"key: {scalar(value)}", "")
    assert document.value == {"key": value} and not document.problems


@pytest.mark.parametrize(
    "word", ["true", "no", "null", "~", "1", "1e4", "0123", "", " x", "a: b", "#x", "-", "22:22", ".inf", "é"]
)
def test_words_with_another_meaning_are_quoted(word: str):
    assert parse(f"[{scalar(word)}]", "").value == [word]


def test_a_dump_is_the_same_configuration():
    config = load_variant(
        model__extra={"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        deepspeed__zero_optimization={"reduce_bucket_size": 1000},
        train__clip=None,
        data__sources=["a b", "c"],
    ).config
    assert loads(dump(config)).config == config
    assert all(f"  {key.rpartition('.')[2]}: " in dump(config) for key in leaves() if "." in key)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_stand_in_configs(name: str):
    path = CONFIGS / PRESETS[name].file
    assert path.read_text() == render(name), "regenerate it: longctx init --preset"
    config = load(path)
    for key, value in PRESETS[name].values.items():
        section, _, leaf = key.partition(".")
        found = getattr(config, section)
        given = getattr(found, leaf) if leaf else found
        assert (given.model_dump(exclude_none=True) if isinstance(given, Section) else given) == value


def test_every_file_in_configs_is_valid():
    files = sorted(CONFIGS.glob("*.yaml"))
    assert {"quickstart.yaml", "smoke.yaml"} <= {path.name for path in files}
    for path in files:
        load(path)


@pytest.mark.parametrize("name", PRESETS)
def test_every_commented_line_of_a_template_can_be_switched_on(name: str):
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


KEYS = {key.rpartition(".")[2] for key in leaves()}


def test_the_reference_is_up_to_date():
    assert (CONFIGS / "README.md").read_text() == reference(), (
        "run: python -m longctx.config.reference > configs/README.md"
    )


def test_every_key_has_a_meaning_and_says_what_it_accepts():
    for key, leaf in leaves().items():
        assert len(leaf.meaning) >= 8 and not leaf.meaning.endswith("."), key
        assert len(expected(leaf)) >= 4, key


def test_the_json_schema_describes_every_key():
    schema = RunConfig.model_json_schema()
    assert schema["additionalProperties"] is False
    for name, kind in sections().items():
        block = schema["$defs"][kind.__name__]
        assert block["additionalProperties"] is False
        assert set(block["properties"]) == set(kind.model_fields)
        assert all("description" in entry for entry in block["properties"].values()), name


def test_explain_says_value_source_and_meaning():
    loaded = loads(text_of(BASE), ["train.lr=0.5"], name="run.yaml")
    rows = {row.key: row for row in explain(loaded, [])}
    assert set(leaves()) <= set(rows)
    assert rows["train.lr"].value == "0.5" and rows["train.lr"].source == "override train.lr"
    assert rows["train.steps"].source.startswith("run.yaml:") and rows["train.seed"].source == "default"
    assert rows["derived.accumulation"].value == "2" and rows["derived.world"].value == "4"
    assert [row.key for row in explain(loaded, ["mesh"])] == ["mesh.ring", "mesh.ulysses", "mesh.data", "mesh.world"]
    assert [row.source for row in explain(None, ["train.steps", "train.lr"])] == ["required", "default"]


@pytest.mark.parametrize(("name", "near"), [("train.clips", "train.clip"), ("trian", "train"), ("lr", "train.lr")])
def test_explain_knows_no_such_key(name: str, near: str):
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        explain(None, [name])


def test_the_configuration_is_frozen():
    config = load_variant().config
    with pytest.raises(ValueError):
        config.train.steps = 5
    assert variant()["train"]["steps"] == config.train.steps == BASE["train"]["steps"]

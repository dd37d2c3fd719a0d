"""Between parser and schema: misspelt keys, environment variables, and secrets in raw blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_samples import BASE, load_variant, problems_of, text_of, variant

from longctx.config.fields import environment_ok
from longctx.config.keys import leaves
from longctx.config.load import loads
from longctx.config.strict_yaml import YamlDocument, parse
from longctx.config.tidy import tidy, unread

GOOD = text_of(BASE)


def tidied(text: str) -> tuple[YamlDocument, list[tuple[str, str]]]:
    """Return the document, and (key, code) of each problem."""
    document = parse(text, "run.yaml")
    tidy(document)
    return document, [(problem.key, problem.code) for problem in document.problems]


def test_a_misspelt_key_is_reported_and_its_value_read() -> None:
    document, problems = tidied("trian: {stepz: 7}\nmodel:\nlr: 0.5")
    assert problems == [("trian", "unknown-key"), ("lr", "unknown-key"), ("train.stepz", "unknown-key")]
    assert document.value == {"train": {"steps": 7, "lr": 0.5}, "model": {}}
    assert document.values[("train", "steps")] == document.values[("trian", "stepz")]


def test_a_misspelt_key_of_another_kind_or_given_twice_is_not_read() -> None:
    document, _ = tidied("zero: {stagee: {a: 1}}\ntrain: {steps: 1, stepz: 2}")
    assert unread(document.value["zero"]["stage"]) and not unread(None)
    assert document.value["train"] == {"steps": 1}


def test_home_is_expanded_in_paths_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    document, problems = tidied("output: {folder: ~/run}\ndata: {text_field: ~/x}")
    assert problems == [] and document.value["output"]["folder"] == str(tmp_path / "run")
    assert document.value["data"]["text_field"] == "~/x"


@pytest.mark.parametrize(
    "name", ["api_key", "apikey", "password", "secret", "hf_token", "access_token", "credentials", "token"]
)
def test_raw_blocks_take_no_secret(name: str) -> None:
    problem = problems_of(text_of(variant(deepspeed__comet={name: "x"}))).problems[0]
    assert problem.code == "secret" and problem.key == f"deepspeed.comet.{name}"


def test_a_token_id_is_no_secret() -> None:
    load_variant(model__extra={"pad_token_id": 0, "eos_token_id": 1})


def test_environment_is_read_only_where_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGCTX_TEST_PLACE", "somewhere")
    declared = {key for key, leaf in leaves().items() if environment_ok(leaf.field)}
    places = {"model.pretrained", "data.sources", "data.tokenizer", "data.folder", "output.folder"}
    assert declared == places | {"launch.folder", "launch.hostfile", "launch.python", "zero.nvme_folder"}
    config = loads(
        GOOD, ["output.folder=${env:LONGCTX_TEST_PLACE}/run", "data.sources=['${env:LONGCTX_TEST_PLACE}']"]
    ).config
    assert config.output.folder == "somewhere/run" and config.data.sources == ("somewhere",)
    for key, leaf in leaves().items():
        if key not in declared and not leaf.raw:
            error = problems_of(GOOD, f"{key}='${{env:LONGCTX_TEST_PLACE}}'")
            assert error.problems[0].code == "environment" and "somewhere" not in str(error)


@pytest.mark.parametrize(
    "text", ["${env:LONGCTX_NOT_SET}", "${HOME}", "${env:}", "${env:1x}", "${env:HOME", "${env:A${env:B}}"]
)
def test_other_forms_are_refused(text: str) -> None:
    assert problems_of(GOOD, f"output.folder={text}").problems[0].code == "environment"


def test_a_variable_cannot_smuggle_in_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGCTX_A", "${env:LONGCTX_B}")
    monkeypatch.setenv("LONGCTX_B", "value-of-b")
    error = problems_of(GOOD, "output.folder=${env:LONGCTX_A}")
    assert "value-of-b" not in str(error)

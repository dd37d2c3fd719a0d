"""Secrets do not appear: not in messages, not in dumps, not in explanations; and none is asked for."""

from __future__ import annotations

import pytest
from config_samples import BASE, load_variant, problems_of, text_of, variant

from longctx.config.explain import explain
from longctx.config.fields import environment_ok
from longctx.config.keys import leaves
from longctx.config.load import loads
from longctx.config.problems import redact, show
from longctx.config.write import dump

GOOD = text_of(BASE)
CANARIES = [
    f"{prefix}c4n4ry{number:02d}SECRETvalue{'x' * 16}"
    for number, prefix in enumerate(
        ["hf_", "sk-", "ghp_", "gho_", "glpat-", "xoxb-", "AKIA", "eyJ", "ghs_", "sk-proj-"] * 4
    )
]


def test_forty_canaries_in_the_environment_stay_there(monkeypatch):
    for number, canary in enumerate(CANARIES):
        monkeypatch.setenv(f"SECRET_{number}", canary)
    shown = []
    for number in range(len(CANARIES)):
        for key in ("model.architecture", "data.text_field", "train.optimizer", "model.extra.x"):
            shown.append(str(problems_of(GOOD, f"{key}='${{env:SECRET_{number}}}'")))
        shown.append(str(problems_of(GOOD + f"k{number}: ${{env:SECRET_{number}}}\n")))
        shown.append(str(problems_of(GOOD, f"output.folder=${{oc.env:SECRET_{number}}}")))
    loaded = load_variant()
    shown += [dump(loaded.config), *(" ".join(row) for row in explain(loaded, []))]
    assert not any(canary in text for text in shown for canary in CANARIES)
    assert len(CANARIES) == 40


def test_forty_canaries_written_into_the_file_are_not_repeated():
    keys = ["train.optimizer", "model.layers", "train.lr", "data.sequence_length"]
    for number, canary in enumerate(CANARIES):
        key = keys[number % len(keys)]
        assert canary not in str(problems_of(GOOD, f"{key}={canary}"))
        assert canary not in str(problems_of(GOOD + f"api_key: {canary}\n"))
        assert canary not in str(problems_of(text_of(variant(deepspeed__wandb={"api_key": canary}))))
        assert "hunter2" not in str(problems_of(GOOD, f"data.sources=https://me:hunter2{number}@host/x"))


@pytest.mark.parametrize(
    "name", ["api_key", "apikey", "password", "secret", "hf_token", "access_token", "credentials", "token"]
)
def test_raw_blocks_take_no_secret(name: str):
    problem = problems_of(text_of(variant(deepspeed__comet={name: "x"}))).problems[0]
    assert problem.code == "secret" and problem.key == f"deepspeed.comet.{name}"


def test_a_token_id_is_no_secret():
    load_variant(model__extra={"pad_token_id": 0, "eos_token_id": 1})


def test_no_key_of_the_schema_is_for_a_secret():
    words = ("token_value", "password", "secret", "api", "credential", "url", "host")
    named = {key for key in leaves() if any(word in key for word in words)}
    assert named == {"launch.hosts", "launch.hostfile", "launch.ranks_per_host"}  # names of machines; no user, no key


def test_environment_is_read_only_where_declared(monkeypatch):
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
def test_other_forms_are_refused(text: str):
    assert problems_of(GOOD, f"output.folder={text}").problems[0].code == "environment"


def test_a_variable_cannot_smuggle_in_another(monkeypatch):
    monkeypatch.setenv("LONGCTX_A", "${env:LONGCTX_B}")
    monkeypatch.setenv("LONGCTX_B", "value-of-b")
    error = problems_of(GOOD, "output.folder=${env:LONGCTX_A}")
    assert "value-of-b" not in str(error)


def test_redaction_keeps_what_is_harmless():
    assert redact("runs/llama-1m_4k") == "runs/llama-1m_4k" and redact("http://host/x") == "http://host/x"
    assert show("x" * 200).endswith("…") and len(show("x" * 200)) <= 60

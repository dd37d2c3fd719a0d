"""Secrets do not appear: not in messages, not in dumps, not in explanations; and none is asked for."""

from __future__ import annotations

from config_samples import BASE, load_variant, problems_of, text_of, variant

from longctx.config.explain import explain
from longctx.config.keys import leaves
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


def test_no_key_of_the_schema_is_for_a_secret():
    words = ("token_value", "password", "secret", "api", "credential", "url", "host")
    named = {key for key in leaves() if any(word in key for word in words)}
    assert named == {"launch.hosts", "launch.hostfile", "launch.ranks_per_host"}  # names of machines; no user, no key

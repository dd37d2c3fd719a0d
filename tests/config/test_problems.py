"""Problems: one line each, in the order of the file, each once, with nothing secret in them."""

from __future__ import annotations

import pytest

from longctx.config.problems import InvalidConfig, Location, Problem, redact, show


def test_problems_are_sorted_by_place_and_each_comes_once() -> None:
    places = [
        Location("override a"),
        Location("f", 9, 1),
        Location("f", 2, 8),
        Location("f", 2, 3),
        Location("f", 9, 1),
    ]
    error = InvalidConfig(Problem(place, "a.b", "is wrong", "code") for place in places)
    assert str(error).split("\n") == [
        f"{place}  a.b: is wrong  [code]" for place in ("f:2:3", "f:2:8", "f:9:1", "override a")
    ]
    assert str(Problem(Location("f", 1, 1), "", "is empty", "empty")) == "f:1:1  is empty  [empty]"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "nothing (null)"),
        (True, "true"),
        (1e-4, "0.0001"),
        ("a", "'a'"),
        ({"a": 1}, "a block of keys"),
        ({}, "{}"),
        ([False, None], "[false, nothing (null)]"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, 6, 7, …]"),
        ("a\x1b", r"'a\x1b'"),
        ("hf_abcdefghijk", "'***'"),
    ],
)
def test_values_are_shown_as_yaml_users_know_them(value: object, shown: str) -> None:
    assert show(value) == shown


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://me:hunter2@host/x", "https://***@host/x"),
        ("a sk-0123456789 b", "a *** b"),
        ("0" * 40, "***"),
        ("0" * 39, "0" * 39),
    ],
)
def test_credentials_are_replaced(text: str, left: str) -> None:
    assert redact(text) == left


def test_redaction_keeps_what_is_harmless() -> None:
    assert redact("runs/llama-1m_4k") == "runs/llama-1m_4k" and redact("http://host/x") == "http://host/x"
    assert show("x" * 200).endswith("…") and len(show("x" * 200)) <= 60

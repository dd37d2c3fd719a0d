"""The keys of the schema: each has a meaning, and says what it accepts."""

from __future__ import annotations

import pytest

from longctx.config.keys import expected, leaves, nearest


def test_every_key_has_a_meaning_and_says_what_it_accepts() -> None:
    for key, leaf in leaves().items():
        assert len(leaf.meaning) >= 8 and not leaf.meaning.endswith("."), key
        assert len(expected(leaf)) >= 4, key


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.steps", "a whole number at least 1 and at most 2^40"),
        ("train.clip", "a number above 0 and at most 1e+09, or null"),
        ("mesh.ring", "a whole number at least 1 and at most 2^20, or auto"),
        ("zero.group", "a whole number at least 2 and at most 2^20, or one of auto, none"),
        ("train.betas", "two numbers [a, b]"),
        ("data.sources", "a list of texts"),
        ("attention.layers", "a block of keys"),
    ],
)
def test_what_a_key_accepts_is_said_in_words(key: str, words: str) -> None:
    assert expected(leaves()[key]) == words


@pytest.mark.parametrize(
    ("section", "name", "meant"),
    [
        ("train", "stepz", ("train.steps",)),
        ("", "trian", ("train",)),
        ("model", "folder", ("output.folder", "data.folder")),  # the likely ones of several first
        ("train", "zero", ("zero",)),
        ("zero", "Offload-Optimizer", ("zero.offload_optimizer",)),
        ("", "qqqqqq", ()),
    ],
)
def test_the_nearest_keys(section: str, name: str, meant: tuple[str, ...]) -> None:
    assert nearest(section, name) == meant

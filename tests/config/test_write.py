"""What is written can be read: single values and whole configurations."""

from __future__ import annotations

import pytest
from config_samples import load_variant
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config.keys import leaves
from longctx.config.load import loads
from longctx.config.strict_yaml import parse
from longctx.config.write import dump, scalar


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

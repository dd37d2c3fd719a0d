"""Whatever the text, the answer is a configuration or an InvalidConfig, within a second."""

from __future__ import annotations

import time

from config_samples import BASE, text_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from longctx.config.keys import leaves
from longctx.config.load import loads
from longctx.config.problems import InvalidConfig
from longctx.config.schema import RunConfig

GOOD = text_of(BASE)
QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def survives(text: str | bytes, overrides: tuple[str, ...] = ()) -> None:
    start = time.process_time()
    try:
        assert isinstance(loads(text, overrides).config, RunConfig)
    except InvalidConfig as error:
        assert error.problems
        for line in str(error).split("\n"):
            assert line.isprintable() and len(line) < 500, line
    assert time.process_time() - start < 1.0


@QUICK
@given(st.text(max_size=400))
@example('a: "\\uD800"')
@example("? ? ? ?\n")
@example("&a a: &a b")
@example("model: &a\n  extra: *a")
def test_any_text(text: str):
    survives(text)


@QUICK
@given(st.binary(max_size=400))
def test_any_bytes(content: bytes):
    survives(content)


@QUICK
@given(st.text(alphabet="[]{}:,-?&*!|>'\"%@`#~ \n\tab01.e<=$\\", max_size=120))
def test_any_punctuation(text: str):
    survives(text)


@QUICK
@given(st.data())
def test_a_good_file_with_pieces_replaced(data: st.DataObject):
    begin = data.draw(st.integers(0, len(GOOD)))
    end = data.draw(st.integers(begin, min(len(GOOD), begin + 40)))
    survives(GOOD[:begin] + data.draw(st.text(max_size=20)) + GOOD[end:])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@QUICK
@given(st.lists(st.tuples(st.sampled_from(sorted(leaves())), VALUES), max_size=4))
def test_any_value_under_any_key(changes: list):
    import json

    tree = {section: dict(block) for section, block in BASE.items()}
    for key, value in changes:
        section, _, name = key.partition(".")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    survives(json.dumps(tree, allow_nan=True))  # JSON is YAML, NaN and Infinity are words in it


@QUICK
@given(
    st.lists(
        st.text(max_size=40) | st.tuples(st.sampled_from(sorted(leaves())), st.text(max_size=30)).map("=".join),
        max_size=3,
    )
)
def test_any_override(overrides: list[str]):
    survives(GOOD, tuple(overrides))

"""Layer specifications: parsing, precedence, round trips and errors."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import ModelError
from longctx.nn.kinds import ABC, CONTROLS, Cosine, Kind, Ring, Window, read_kind, read_layers, write_layers

kinds = st.one_of(
    st.just(Ring()),
    st.builds(Window, st.integers(1, 10**6)),
    st.builds(Cosine, st.sampled_from(["value", "query"]), st.floats(-5, 5)),
    st.builds(
        ABC, st.integers(1, 512), st.sampled_from(CONTROLS), st.sampled_from([None, "prefix", "running", "global"]),
        st.sampled_from(["x", "kv"]), st.booleans(), st.booleans(), st.integers(1, 9), st.none() | st.integers(1, 99),
        st.integers(0, 2**62),
    ),
)  # fmt: skip


@given(st.lists(kinds, min_size=1, max_size=6))
def test_written_layers_are_read_back(layers: list[Kind]) -> None:
    written = json.loads(json.dumps(write_layers(tuple(layers))))
    assert read_layers(written or {"*": "ring"}, len(layers)) == tuple(layers)


def test_the_example_of_the_docs() -> None:
    spec = {"0-5": "ring", "6-11": {"abc": {"slots": 64}}, "3": "cosine", "4": {"window": 1024}}
    layers = read_layers(spec, 12)
    assert layers[:3] == (Ring(),) * 3 and layers[5] == Ring() and layers[6:] == (ABC(64),) * 6
    assert layers[3] == Cosine() and layers[4] == Window(1024)


def test_later_entries_win_and_lists_of_layers() -> None:
    assert read_layers({"*": "abc", "1, 3-4": "ring", 0: "softmax"}, 6) == (
        Ring(), Ring(), ABC(), Ring(), Ring(), ABC(),
    )  # fmt: skip
    assert read_layers({"1": "cottention"}, 3, (ABC(), ABC(), ABC())) == (ABC(), Cosine(), ABC())
    assert read_kind({"abc": None}) == ABC() and read_kind({"window": {"size": 7}}) == Window(7)


@pytest.mark.parametrize(
    "kind, message",
    [
        ({"abc": {"seed": -1}}, "seed is -1"),
        ({"abc": {"tied": 1}}, "tied is 1"),
        ({"abc": {"slots": True}}, "slots is True"),
        ({"abc": {"normalizer": "prefixed"}}, "did you mean 'prefix'"),
        ({"abc": {"max_length": 0}}, "max_length is 0"),
        ({"cosine": {"scale_on": "key"}}, "scale_on is 'key'"),
        ({"cosine": {"exponent": float("nan")}}, "exponent is nan"),
        ({"cosine": 3}, "a block of keys"),
        ({"abc": {}, "cosine": {}}, "name one kind"),
        (None, "name one kind"),
    ],
)
def test_errors(kind: object, message: str) -> None:
    with pytest.raises(ModelError) as error:
        read_kind(kind)
    assert message in str(error.value)

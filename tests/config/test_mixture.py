"""Sources with weights: both ways to write them are one configuration; what is wrong is named at its key."""

from __future__ import annotations

import pytest
from config_samples import BASE, problems_of, text_of

from longctx.config.load import loads
from longctx.config.write import dump


def written(sources: str, *overrides: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    config = loads(text_of(BASE), [f"data.sources={sources}", *overrides]).config
    assert loads(dump(config)).config == config
    return config.data.sources, config.data.weights


def test_blocks_and_lists_are_the_same() -> None:
    both = (("a", "b"), (3.0, 1.0))
    assert written("[{path: a, weight: 3}, {path: b, weight: 1}]") == both
    assert written("[{path: a, weight: 3}, b]") == both
    assert written("[a, b]", "data.weights=[3, 1]") == both
    assert written("[{path: a}, b]") == (("a", "b"), ())
    assert written("{path: a, weight: 2}") == (("a",), (2.0,))


@pytest.mark.parametrize(
    ("sources", "key", "words"),
    [
        ("[{path: a, wieght: 3}]", "data.sources", "unknown key 'wieght' in a source; write {path: FILE, weight"),
        ("[{weight: 3}]", "data.sources", "a source has no path"),
        ("[{path: a, weight: 0}, b]", "data.weights", "above 0"),
        ("[{path: a, weight: many}, b]", "data.weights", "a list of numbers"),
    ],
)
def test_mistakes_are_named(sources: str, key: str, words: str) -> None:
    found = problems_of(text_of(BASE), f"data.sources={sources}").problems
    assert any(problem.key.startswith(key) and words in problem.message for problem in found), found


def test_weights_must_fit_the_sources() -> None:
    (problem,) = problems_of(text_of(BASE), "data.sources=[a, b]", "data.weights=[1, 2, 3]").problems
    assert problem.key == "data.weights" and "got 3 weights for 2 sources" in problem.message
    (problem,) = problems_of(text_of(BASE), "data.sources=[{path: a, weight: 1}]", "data.weights=[1]").problems
    assert problem.key == "data.weights" and "weights of their own" in problem.message

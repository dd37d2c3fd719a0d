"""The building blocks: numbers as people write them, lists of one, strict frozen sections."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field, ValidationError

from longctx.config.fields import (
    AutoInt,
    Group,
    HumanInt,
    Section,
    Texts,
    Tile,
    UnknownValue,
    changed,
    environment_field,
    environment_ok,
    human_int,
    listed,
)


class Sample(Section):
    """One field of each kind."""

    size: HumanInt = 3
    ranks: AutoInt = "auto"
    tile: Tile = "none"
    group: Group = "none"
    names: Texts = ()
    rate: float = Field(0.5, ge=0)
    folder: str = environment_field("runs")


@pytest.mark.parametrize(
    ("text", "number"),
    [("1_000", 1000), ("-3k", -3000), ("2M", 2 * 10**6), ("8Ki", 8192), ("1Gi", 2**30), (1e4, 10_000), (7, 7)],
)
def test_numbers_as_people_write_them(text: Any, number: int) -> None:
    assert human_int(text) == number and type(human_int(text)) is int


@pytest.mark.parametrize("value", ["1_00", "10kb", "1.5", " 3", "", 1.5, 1e300, None, [3]])
def test_anything_else_is_left_to_pydantic(value: Any) -> None:
    assert human_int(value) is value
    with pytest.raises(ValidationError):
        Sample(size=value)


def test_one_text_is_a_list_of_one() -> None:
    assert listed("a") == ("a",) and listed(["a", "b"]) == ("a", "b") and listed(3) == 3


def test_words_pass_beside_numbers() -> None:
    sample = Sample.model_validate({"ranks": "4", "tile": "1Ki", "group": "auto", "names": "a"})
    assert (sample.ranks, sample.tile, sample.group, sample.names) == (4, 1024, "auto", ("a",))


@pytest.mark.parametrize(
    "wrong",
    [{"ranks": 0}, {"ranks": "none"}, {"tile": 0}, {"group": 1}, {"rate": float("nan")}, {"rate": "1"}, {"other": 1}],
)
def test_sections_are_strict(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Sample.model_validate(wrong)


def test_a_default_written_out_is_no_change() -> None:
    assert changed(Sample()) == changed(Sample(size=3, rate=0.5)) == set()
    assert changed(Sample.model_validate({"size": "4", "ranks": 2})) == {"size", "ranks"}


def test_a_key_without_a_value_says_so_and_any_other_name_is_an_attribute_error() -> None:
    sample = Sample()
    del vars(sample)["size"]
    with pytest.raises(UnknownValue, match="size"):
        _ = sample.size
    with pytest.raises(AttributeError):
        _ = sample.no_field  # type: ignore[attr-defined]
    assert changed(sample) == set()


def test_the_environment_is_read_where_the_field_says_so() -> None:
    assert [name for name, field in Sample.model_fields.items() if environment_ok(field)] == ["folder"]

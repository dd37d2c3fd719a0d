"""Building blocks of the schema: a strict base class, and types for numbers as people write them.

Sections are frozen and reject unknown keys; numbers are finite; ``1_000``, ``10k`` and ``8Ki`` are whole numbers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_SUFFIX = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_HUMAN = re.compile(r"(-?)([0-9]{1,15}|[0-9]{1,3}(?:_[0-9]{3}){1,4})(k|M|G|Ki|Mi|Gi)?", re.ASCII)
_ENVIRONMENT_OK = "environment_ok"


class UnknownValue(Exception):
    """Raised on reading a key whose value in the YAML is wrong or missing (see `partial.without`)."""


class Section(BaseModel):
    """One block of the YAML: frozen, strict, without unknown keys, without nan or inf."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    if not TYPE_CHECKING:  # otherwise type checkers accept any attribute name

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise UnknownValue(name)
            return super().__getattr__(name)


def human_int(value: Any) -> Any:
    """Turn ``"1_000"``, ``"10k"`` (thousand), ``"8Ki"`` (1024) and integral floats such as ``1e4`` into an int.

    Anything else is returned unchanged, for pydantic to reject.
    """
    if isinstance(value, str):
        match = _HUMAN.fullmatch(value)
        if match:
            number = int(match[2].replace("_", "")) * _SUFFIX[match[3] or ""]
            return -number if match[1] else number
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def human_int_or_auto(value: Any) -> Any:
    """Like ``human_int``; the word ``auto`` passes through."""
    return value if value == "auto" else human_int(value)


def human_tile(value: Any) -> Any:
    """Like ``human_int``; the words ``auto`` and ``none`` pass through."""
    return value if value in ("auto", "none") else human_int(value)


def listed(value: Any) -> Any:
    """Turn one string, or a YAML list, into a tuple: ``sources: text/`` is ``sources: [text/]``."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


HumanInt = Annotated[int, BeforeValidator(human_int, json_schema_input_type=int | str)]
AutoInt = Annotated[
    Annotated[int, Field(ge=1, le=2**20)] | Literal["auto"],
    BeforeValidator(human_int_or_auto, json_schema_input_type=int | str),
]
Tile = Annotated[
    Annotated[int, Field(ge=1, le=2**30)] | Literal["auto", "none"],
    BeforeValidator(human_tile, json_schema_input_type=int | str),
]
Group = Annotated[
    Annotated[int, Field(ge=2, le=2**20)] | Literal["auto", "none"],
    BeforeValidator(human_tile, json_schema_input_type=int | str),
]
Texts = Annotated[tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str])]
Weights = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(listed, json_schema_input_type=list[float])
]
Pair = Annotated[tuple[float, float], BeforeValidator(listed, json_schema_input_type=list[float])]
Numbers = Annotated[tuple[float, ...], BeforeValidator(listed, json_schema_input_type=list[float])]
Raw = dict[str, Any]


def environment_field(default: Any = ..., **keywords: Any) -> Any:
    """Return a field whose value may contain ``${env:NAME}``: paths only, never secrets."""
    return Field(default, json_schema_extra={_ENVIRONMENT_OK: True}, **keywords)


def environment_ok(field: Any) -> bool:
    """Say whether this pydantic field may contain ``${env:NAME}``."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(_ENVIRONMENT_OK))


def changed(section: Section) -> set[str]:
    """Return the keys of a section that are not at their default; writing a default out is never a mistake."""
    fields = type(section).model_fields
    values = vars(section)  # without keys whose value is unknown
    return {key for key in values if values[key] != fields[key].get_default(call_default_factory=True)}

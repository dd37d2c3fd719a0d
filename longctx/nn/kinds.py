"""The kind of attention of each layer of a model: frozen dataclasses, read from a layer specification.

`longctx.convert` and `attention.layers` of a YAML take such a specification:

    {"0-5": "ring", "6-11": {"abc": {"slots": 64}}, "3": "cosine", "4": {"window": 1024}}

Keys are layers: a number, a range including both ends, several of these separated by commas, or ``*`` for all. Later
entries override earlier ones. No torch here: a configuration is checked with it before torch is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from longctx.errors import ModelError

CONTROLS = ("mlp", "linformer", "random", "cluster", "window", "dilated", "compressive", "identity")
NORMALIZERS = ("prefix", "running", "global", "sum")
_LAYERS = re.compile(r"(\d{1,6})(?:\s*-\s*(\d{1,6}))?")


@dataclass(frozen=True)
class Ring:
    """Exact softmax attention over the ring: the model's own."""

    name = "ring"


@dataclass(frozen=True)
class Window:
    """Exact softmax attention to the last ``size`` tokens, the token itself included."""

    name = "window"
    size: int = 1024

    def __post_init__(self) -> None:
        _require_count(self, "size")


@dataclass(frozen=True)
class ABC:
    """Attention with bounded-memory control (Peng et al. 2022): ``slots`` keys and values for any length."""

    name = "abc"
    slots: int = 64
    control: str = "mlp"  # decides which slots a token is written to
    normalizer: str | None = None  # None: prefix where attention is causal, global where not
    control_input: str = "x"  # mlp: the layer's input, or "kv": keys and values
    per_head: bool = True  # mlp, linformer: one control per key/value head
    tied: bool = True  # mlp: keys and values share one control
    rate: int = 4  # dilated: one slot per rate-th token; compressive: tokens pooled into one slot
    max_length: int | None = None  # linformer: longest sequence; None: the model's
    seed: int = 0  # random

    def __post_init__(self) -> None:
        for field in ("slots", "rate"):
            _require_count(self, field)
        if self.max_length is not None:
            _require_count(self, "max_length")
        _require_word(self, "control", CONTROLS)
        _require_word(self, "control_input", ("x", "kv"))
        if self.normalizer is not None:
            _require_word(self, "normalizer", NORMALIZERS)
        for field in ("per_head", "tied"):
            if not isinstance(getattr(self, field), bool):
                raise ModelError(f"abc: {field} is {getattr(self, field)!r}; write true or false")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise ModelError(f"abc: seed is {self.seed!r}; write a whole number, at least 0")


@dataclass(frozen=True)
class Cosine:
    """Cottention (Mongaras et al. 2024): cosine similarity, a D × D state and one learned exponent per head."""

    name = "cosine"
    scale_on: str = "value"
    exponent: float = 0.5  # initial value, before the sigmoid

    def __post_init__(self) -> None:
        _require_word(self, "scale_on", ("value", "query"))
        if not isinstance(self.exponent, int | float) or not abs(self.exponent) < 1e3:
            raise ModelError(f"cosine: exponent is {self.exponent!r}; write a number, 0.5 as in the paper")


Kind: TypeAlias = Ring | Window | ABC | Cosine
KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (Ring, Window, ABC, Cosine)}
_SYNONYMS = {"softmax": "ring", "cottention": "cosine", "sliding_window": "window"}


def read_layers(spec: Any, layers: int, before: tuple[Kind, ...] = ()) -> tuple[Kind, ...]:
    """Return the kind of each of ``layers`` layers; layers that ``spec`` does not name keep their kind.

    Args:
        before: the kinds so far; default ``Ring``.

    Raises:
        ModelError: a layer out of range, an unknown kind or option, or a value of the wrong type.
    """
    if not isinstance(spec, dict) or not spec:
        raise ModelError(f'layers: {spec!r}; write a block like {{"0-5": "ring", "6-11": {{"abc": {{"slots": 64}}}}}}')
    kinds: list[Kind] = list(before) or [Ring()] * layers
    for key, value in spec.items():
        kind = read_kind(value, f"layers {key!r}")
        for index in read_indices(key, layers):
            kinds[index] = kind
    return tuple(kinds)


def read_indices(key: Any, layers: int) -> list[int]:
    """Return the layers that a key names: ``3``, ``"3"``, ``"0-5"``, ``"0-2, 7"`` or ``"*"``."""
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise ModelError(f"layers: key {key!r}; write a layer's number, a range like '0-5', or '*'")
    if str(key).strip() == "*":
        return list(range(layers))
    found: list[int] = []
    for part in str(key).split(","):
        match = _LAYERS.fullmatch(part.strip())
        if match is None:
            raise ModelError(f"layers: key {key!r}; write a layer's number, a range like '0-5', or '*'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ModelError(f"layers: key {key!r} ends before it begins; write '{last}-{first}'")
        if last >= layers:
            raise ModelError(f"layers: key {key!r}, but the model has {layers} layers, 0 to {layers - 1}")
        found += range(first, last + 1)
    return found


def read_kind(value: Any, where: str = "layers") -> Kind:
    """Return the kind that ``"abc"``, ``{"abc": {"slots": 64}}`` or ``{"window": 1024}`` means."""
    if isinstance(value, Ring | Window | ABC | Cosine):
        return value
    name: Any = value
    options: Any = {}
    if isinstance(value, dict) and len(value) == 1:
        ((name, options),) = value.items()
    if not isinstance(name, str):
        raise ModelError(f"{where}: got {value!r}; name one kind: {', '.join(KINDS)}, or a block {{kind: options}}")
    kind = KINDS.get(_SYNONYMS.get(name, name))
    if kind is None:
        raise ModelError(
            f"{where}: unknown kind {name!r}{_near(name, [*KINDS, *_SYNONYMS])}; use one of {', '.join(KINDS)}"
        )
    if kind is Window and isinstance(options, int) and not isinstance(options, bool):
        return Window(options)
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise ModelError(f"{where}: {name} got {options!r}; its options are a block of keys")
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            has = ", ".join(known) or "none"
            raise ModelError(
                f"{where}: unknown option {option!r} of {name}{_near(str(option), known)}; its options are {has}"
            )
    return kind(**options)


def write_layers(kinds: tuple[Kind, ...]) -> dict[str, Any]:
    """Return a specification that ``read_layers`` reads back as ``kinds``, with every option explicit."""
    return {str(index): {kind.name: dataclasses.asdict(kind)} for index, kind in enumerate(kinds) if kind != Ring()}


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _require_count(kind: Any, field: str) -> None:
    value = getattr(kind, field)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**40:
        raise ModelError(f"{kind.name}: {field} is {value!r}; write a whole number, at least 1")


def _require_word(kind: Any, field: str, words: tuple[str, ...]) -> None:
    value = getattr(kind, field)
    if value not in words:
        near = _near(value, list(words)) if isinstance(value, str) else ""
        raise ModelError(f"{kind.name}: {field} is {value!r}{near}; use one of {', '.join(words)}")

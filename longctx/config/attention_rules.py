"""Rules of `attention.window` and `mesh.ulysses`, which depend on the model's attention."""

from __future__ import annotations

from collections.abc import Iterator

from longctx.config.architecture import WINDOWED
from longctx.config.findings import Finding, Rule
from longctx.config.schema import RunConfig
from longctx.config.topology import has_bounded_layers, heads


def _window_of_the_model(config: RunConfig) -> Iterator[Finding]:
    if config.attention.window is None:
        return
    name = config.model.architecture
    if config.model.pretrained is not None:
        yield Finding("attention.window", "the pretrained folder decides the window; remove the key", "window")
    elif name is not None and name not in WINDOWED:
        message = f"{name} has no sliding window; architectures with one: {', '.join(sorted(WINDOWED))}"
        yield Finding("attention.window", message, "window")


def _window_below_the_row(config: RunConfig) -> Iterator[Finding]:
    window, model = config.attention.window, config.model
    if window is None or model.pretrained is not None or model.architecture not in (None, *WINDOWED):
        return
    if window >= config.data.sequence_length:
        message = f"got {window}, not below sequence_length {config.data.sequence_length}; remove the key for full "
        yield Finding("attention.window", message + "attention", "window")


def _ulysses_within_the_heads(config: RunConfig) -> Iterator[Finding]:
    ulysses = config.mesh.ulysses
    if ulysses == "auto" or ulysses == 1:
        return
    queries, _ = heads(config)
    if queries is not None and ulysses > queries:
        message = f"got {ulysses}, above the model's {queries} heads; use at most {queries}, and mesh.ring for the rest"
        yield Finding("mesh.ulysses", message, "heads")


def _ulysses_of_bounded_layers(config: RunConfig) -> Iterator[Finding]:
    ulysses = config.mesh.ulysses
    if ulysses not in ("auto", 1) and has_bounded_layers(config):
        message = (
            f"got {ulysses}, but the bounded layers of attention.layers pass their state along a ring only; use 1 and "
            "a larger mesh.ring"
        )
        yield Finding("mesh.ulysses", message, "layers")


RULES: tuple[Rule, ...] = (
    _window_of_the_model,
    _window_below_the_row,
    _ulysses_within_the_heads,
    _ulysses_of_bounded_layers,
)

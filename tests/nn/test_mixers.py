"""Mixers pass what their kind says to the operators, with the parameters that the kind needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longctx.bounded.abc import control
from longctx.bounded.abc.operator import abc_attention
from longctx.bounded.cosine.operator import cosine_attention
from longctx.errors import ModelError
from longctx.nn.kinds import ABC, Cosine, Kind, Ring, Window
from longctx.nn.mixers import ABCMixer, CosineMixer, make_mixer
from longctx.nn.window import WindowMixer

HIDDEN, HEADS, GROUPS, WIDTH, TOKENS = 12, 4, 2, 5, 9


def make(kind: Kind, **options: Any) -> Any:
    torch.manual_seed(0)
    mixer = make_mixer(kind, hidden_size=HIDDEN, heads=HEADS, kv_heads=GROUPS, head_dim=WIDTH, **options)
    return mixer if mixer is None else mixer.double()


def tensors() -> tuple[torch.Tensor, ...]:
    """Return query, key, value and the layer's input."""
    g = torch.Generator().manual_seed(1)
    shapes = [(2, HEADS, TOKENS, WIDTH), (2, GROUPS, TOKENS, WIDTH), (2, GROUPS, TOKENS, WIDTH), (2, TOKENS, HIDDEN)]
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize(("kind", "mixer"), [(Window(7), WindowMixer), (ABC(3), ABCMixer), (Cosine(), CosineMixer)])
def test_every_kind_has_its_mixer(kind: Kind, mixer: type) -> None:
    assert type(make(kind)) is mixer and make(kind).kind == kind
    assert make(Ring()) is None


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("control_input", ["x", "kv"])
def test_the_learned_control_is_a_linear_of_its_input(control_input: str, tied: bool, per_head: bool) -> None:
    mixer, (_, key, value, x) = make(ABC(3, control_input=control_input, tied=tied, per_head=per_head)), tensors()
    if control_input == "x":
        key = value = x[:, None].expand(-1, GROUPS, -1, -1)
    expected = [
        torch.einsum("bgtd,gmd->bgtm", y, weight.expand(GROUPS, -1, -1))
        for y, weight in ((key, mixer.key_control), (value, mixer.value_control)) if weight is not None
    ]  # fmt: skip
    found = mixer.control(*tensors()[1:])
    assert len(expected) == 2 - tied
    assert all(a.allclose(b) for a, b in zip([found] if tied else found, expected, strict=True))


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        (ABC(4, "random", seed=5), control.random(4, 5)), (ABC(4, "cluster"), control.cluster(4)),
        (ABC(4, "window"), control.window(4)), (ABC(4, "dilated", rate=3), control.dilated(4, 3)),
        (ABC(4, "compressive", rate=3), control.compressive(4, 3)), (ABC(4, "identity"), control.identity()),
    ],
)  # fmt: skip
def test_other_controls_are_the_operators_strategies(kind: ABC, strategy: control.Control) -> None:
    mixer, (q, k, v, _) = make(kind), tensors()
    assert mixer.control(k, v, None) == strategy and not list(mixer.parameters())
    assert mixer(q, k, v, scale=0.3).equal(abc_attention(q, k, v, strategy, scale=0.3))


def test_random_controls_differ_between_layers() -> None:
    first, second = (make(ABC(4, "random"), layer_index=index).control(*tensors()[:2], None) for index in (0, 1))
    assert first.seed != second.seed and 0 <= second.seed < 2**63


def test_linformer_has_a_weight_per_position() -> None:
    assert make(ABC(3, "linformer", max_length=20), max_length=30).key_control.shape == (GROUPS, 3, 20)
    mixer, (q, k, v, _) = make(ABC(3, "linformer", per_head=False), max_length=30), tensors()
    assert mixer.key_control.shape == (1, 3, 30)
    assert mixer(q, k, v).equal(abc_attention(q, k, v, control.linformer(mixer.key_control)))
    with pytest.raises(ModelError, match="give max_length"):
        make(ABC(3, "linformer"))


@pytest.mark.parametrize(
    ("normalizer", "causal", "used"), [(None, True, "prefix"), (None, False, "global"), ("running", True, "running")]
)
def test_the_normalizer_follows_causal_unless_given(normalizer: str | None, causal: bool, used: str) -> None:
    mixer, (q, k, v, x) = make(ABC(3, normalizer=normalizer)), tensors()
    expected = abc_attention(q, k, v, mixer.control(k, v, x), causal=causal, normalizer=used)
    assert mixer(q, k, v, x, causal=causal).equal(expected)


def test_a_control_of_the_input_needs_it() -> None:
    with pytest.raises(ModelError, match="pass inputs"):
        make(ABC(3))(*tensors()[:3])


@pytest.mark.parametrize("scale_on", ["value", "query"])
def test_cosine_starts_from_its_exponent(scale_on: str) -> None:
    mixer, (q, k, v, _) = make(Cosine(scale_on, 0.25)), tensors()
    assert mixer.exponent.tolist() == [0.25] * HEADS
    assert mixer(q, k, v, scale=7.0).equal(cosine_attention(q, k, v, mixer.exponent, scale_on=scale_on))


def test_logits_of_unit_inputs_have_unit_size() -> None:
    torch.manual_seed(0)
    mixer = ABCMixer(ABC(64), 512, GROUPS, WIDTH)
    logits = mixer.control(torch.zeros(1), torch.zeros(1), torch.randn(1, 100, 512))
    assert 0.9 < float(logits.detach().std()) < 1.1

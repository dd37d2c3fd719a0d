"""longctx.nn.ABCAttention and CosineAttention against loops over tokens written out here, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longctx
from longctx.errors import ModelError

from tolerances import tolerance

WIDTH, HEADS, GROUPS = 12, 4, 2


def angles(tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    turns = torch.arange(tokens, dtype=torch.float64)[:, None] / 3.0 ** torch.arange(size // 2, dtype=torch.float64)
    both = torch.cat((turns, turns), -1)[None]
    return both.cos(), both.sin()


def rotated(x: torch.Tensor, turn: int) -> torch.Tensor:
    """Rotate one head's vector (D,) of token number ``turn``, pair by pair."""
    out = x.clone()
    half = x.shape[0] // 2
    for pair in range(half):
        angle = torch.tensor(turn / 3.0**pair, dtype=torch.float64)
        a, b = x[pair], x[pair + half]
        out[pair], out[pair + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def projected(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries (T, H, D), keys and values (T, G, D) of one row x (T, hidden)."""
    q, k, v = (p(x).view(x.shape[0], -1, layer.head_dim) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q = torch.stack([torch.stack([rotated(h, t) for h in row]) for t, row in enumerate(q)])
    k = torch.stack([torch.stack([rotated(h, t) for h in row]) for t, row in enumerate(k)])
    return q, k, v


def abc_by_loops(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """ABC with control mlp: a slot is the softmax-weighted mean of the tokens so far; attention goes to the slots."""
    kind, rows = layer.memory.kind, []
    for row in x:
        q, k, v = projected(layer, row)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            own = group if kind.per_head else 0
            outs = []
            for t in range(len(row)):
                keys, values = [], []
                for slot in range(kind.slots):

                    def weights(control: torch.Tensor, tokens: torch.Tensor, own: int, slot: int, t: int) -> Any:
                        return torch.stack([control[own, slot] @ tokens[j] for j in range(t + 1)]).softmax(0)

                    read = {"x": (row, row), "kv": (k[:, group], v[:, group])}[kind.control_input]
                    first = weights(layer.memory.key_control, read[0], own, slot, t)
                    second = first
                    if not kind.tied:
                        second = weights(layer.memory.value_control, read[1], own, slot, t)
                    keys.append(sum(first[j] * k[j, group] for j in range(t + 1)))
                    values.append(sum(second[j] * v[j, group] for j in range(t + 1)))
                p = torch.stack([q[t, head] @ key for key in keys]).div(layer.head_dim**0.5).softmax(0)
                outs.append(sum(p[slot] * values[slot] for slot in range(kind.slots)))
            heads.append(torch.stack(outs))
        rows.append(layer.o_proj(torch.stack(heads, 1).flatten(1)))
    return torch.stack(rows)


def cosine_by_loops(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Cottention: similarity of directions, divided by a power of the number of tokens."""
    kind, rows = layer.memory.kind, []
    power = torch.sigmoid(layer.memory.exponent)
    for row in x:
        q, k, v = projected(layer, row)
        heads = []
        for head in range(HEADS):
            group, outs = head // (HEADS // GROUPS), []
            for t in range(len(row)):
                total = torch.zeros(layer.head_dim, dtype=torch.float64)
                for j in range(t + 1):
                    count = float(j + 1 if kind.scale_on == "value" else t + 1)
                    likeness = (q[t, head] / q[t, head].norm()) @ (k[j, group] / k[j, group].norm())
                    total = total + likeness * v[j, group] * count ** -power[head]
                outs.append(total)
            heads.append(torch.stack(outs))
        rows.append(layer.o_proj(torch.stack(heads, 1).flatten(1)))
    return torch.stack(rows)


def compare(layer: Any, truth: Any, batch: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    out = layer(x, position_embeddings=angles(tokens, layer.head_dim))
    wanted = truth(layer, x)
    ours = torch.autograd.grad((out * probe).sum(), inputs)
    theirs = torch.autograd.grad((wanted * probe).sum(), inputs)
    for a, b in zip((out, *ours), (wanted, *theirs), strict=True):
        assert (a - b).abs().max() <= tolerance("fp64") * b.abs().max().clamp(min=1)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 6), st.integers(1, 4), st.sampled_from(["x", "kv"]), st.booleans(), st.booleans()
)
def test_abc(batch: int, tokens: int, slots: int, read: str, tied: bool, per_head: bool) -> None:
    options = {"control_input": read, "tied": tied, "per_head": per_head}
    layer = longctx.nn.ABCAttention(WIDTH, HEADS, GROUPS, 4, slots=slots, bias=True, **options).double()
    compare(layer, abc_by_loops, batch, tokens, slots)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 2), st.integers(1, 7), st.sampled_from(["value", "query"]))
def test_cosine(batch: int, tokens: int, scale_on: str) -> None:
    layer = longctx.nn.CosineAttention(WIDTH, HEADS, GROUPS, 4, scale_on=scale_on).double()
    compare(layer, cosine_by_loops, batch, tokens, tokens)


@pytest.mark.parametrize("name", ["ABCAttention", "CosineAttention"])
def test_a_state_continues_its_sequence(name: str) -> None:
    torch.manual_seed(0)
    layer = getattr(longctx.nn, name)(WIDTH, HEADS, GROUPS, 4).double()
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    cosines, sines = angles(11, 4)
    whole = layer(x, position_embeddings=(cosines, sines))
    parts, state = [], None
    for start, end in ((0, 4), (4, 5), (5, 11)):
        where = (cosines[:, start:end], sines[:, start:end])
        out, state = layer(x[:, start:end], position_embeddings=where, state=state, return_state=True)
        parts.append(out)
    assert (torch.cat(parts, 1) - whole).abs().max() <= tolerance("fp64")


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="divide heads=4"):
        longctx.nn.CosineAttention(12, 4, 3)
    with pytest.raises(ModelError, match="give head_dim"):
        longctx.nn.ABCAttention(13, 4)
    with pytest.raises(ModelError, match="unknown option 'slot'"):
        longctx.nn.ABCAttention(12, 4, slot=3)
    with pytest.raises(ModelError, match="max_length"):
        longctx.nn.ABCAttention(12, 4, control="linformer")
    with pytest.raises(AttributeError, match="ABCAttention"):
        _ = longctx.nn.Attention

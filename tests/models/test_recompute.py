"""Recomputed layers: the same loss and gradients in every family, and what they keep and repeat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.zoo import CAUSAL, VOCABULARY, tiny_config, tiny_model

from longctx.attention.passes import Passes
from longctx.errors import ModelError
from longctx.models.activations.mlp import tile_mlps
from longctx.models.activations.recompute import recompute_layers
from longctx.models.convert import convert


def step(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of one forward and backward."""
    model.zero_grad()
    ids = torch.randint(0, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", ["layer", "layer_keep_attention"])
@pytest.mark.parametrize("kind", [*CAUSAL, "llama-abc", "bert"])
def test_gradients_are_the_same_to_the_last_bit(kind: str, policy: Any) -> None:
    config = tiny_config(kind.removesuffix("-abc"))
    if kind == "llama-abc":
        config = convert(config, {"1": {"abc": {"slots": 4}}})
    model = tiny_model(config, "longctx").train()
    wanted = step(model)
    recompute_layers(model, policy)
    got = step(model)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize(("policy", "runs"), [("none", 2), ("layer", 4), ("layer_keep_attention", 2)])
def test_attention_is_repeated_by_layer_only(policy: Any, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = Passes.forward
    monkeypatch.setattr(Passes, "forward", lambda *args: seen.append(1) or forward(*args))  # type: ignore[func-returns-value]
    model = tiny_model(tiny_config("llama"), "longctx").train()
    recompute_layers(model, policy)
    step(model)
    assert len(seen) == runs


RUNS = dict.fromkeys(("llama", "mistral", "qwen3", "gemma", "gpt2", "phi", "olmo"), 2)
RUNS |= dict.fromkeys(("gemma2", "gemma3", "olmo2"), 3)  # they normalise the MLP's result, which needs it again


@pytest.mark.parametrize("kind", RUNS)
def test_a_recomputed_layer_runs_its_tiled_mlp_twice(kind: str) -> None:
    model = tiny_model(tiny_config(kind), "longctx").train()
    tokens: list[int] = []
    for mlp in tile_mlps(model, 5):
        first = next(part for part in mlp.modules() if any(True for _ in part.parameters(recurse=False)))
        first.register_forward_hook(lambda module, args, out: tokens.append(out.shape[1]))
    recompute_layers(model, "layer_keep_attention")
    step(model)
    assert sum(tokens) == 2 * 42 * RUNS[kind]  # layers, tokens
    assert max(tokens) == 5


def test_bad_policies_are_named() -> None:
    model = tiny_model(tiny_config("llama"), "longctx")
    with pytest.raises(ModelError, match="'layers': one of none, mlp, layer, layer_keep_attention"):
        recompute_layers(model, "layers")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="Linear; use none or mlp"):
        recompute_layers(torch.nn.Linear(1, 1), "layer")

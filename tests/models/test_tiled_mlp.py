"""Models with tiled MLPs: the same loss and gradients as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.zoo import CAUSAL, VOCABULARY, tiny_config, tiny_model

from longctx.errors import ModelError
from longctx.models.activations.mlp import find_mlps, tile_mlps

from tolerances import tolerance

KINDS = [name for name in CAUSAL if name not in ("gpt-oss", "qwen3-window")]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = torch.randint(0, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_model_as_it_was(kind: str) -> None:
    model = tiny_model(tiny_config(kind), "longctx").double().train()
    wanted = gradients(model)
    assert len(tile_mlps(model, 5)) == 2
    got = gradients(model)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= tolerance("model") * gradient.norm().clamp(min=1e-6), name


def test_dropout_inside_an_mlp_is_drawn_alike_in_backward() -> None:
    model = tiny_model(tiny_config("gpt2", resid_pdrop=0.3), "longctx").double().train()
    torch.manual_seed(3)
    wanted = gradients(model)
    tile_mlps(model, 100)  # one tile draws what the whole MLP draws
    torch.manual_seed(3)
    got = gradients(model)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= tolerance("model") * gradient.norm().clamp(min=1e-6), name


def test_short_and_long_sequences_take_one_path() -> None:
    """Else ranks with rows of different lengths would finish gradients in different orders."""
    model = tiny_model(tiny_config("llama"), "longctx")
    kept: list[int] = []
    mlp = tile_mlps(model, "auto")[0]

    def saved(tokens: int) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            mlp(torch.randn(1, tokens, 32, requires_grad=True))
        return len(kept)

    assert saved(1) == saved(128) == saved(129) == 1  # 128 tokens are a tile


def test_blocks_of_experts_are_refused_by_name() -> None:
    model = tiny_model(tiny_config("gpt-oss"), "longctx")
    assert find_mlps(model) == ([], ["GptOssMLP"])
    with pytest.raises(ModelError, match="GptOssMLP routes tokens to experts"):
        tile_mlps(model)
    with pytest.raises(ModelError, match="no module named as an MLP"):
        tile_mlps(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ModelError, match="positive number"):
        tile_mlps(model, 0)

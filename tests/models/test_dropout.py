"""Attention dropout in training: what transformers would compute with the same mask, the same on every ring."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models.zoo import documents, positions_of, tiny_config, tiny_model

import longctx
from longctx.errors import ModelError
from longctx.kernels.flash.dropout import kept
from longctx.models.attach import attach_attention
from longctx.models.hook.dropout import drops_attention, layer_seeds

from distributed import run_ranks
from tolerances import tolerance

KEYS = {"llama": "attention_dropout", "gpt2": "attn_pdrop", "bert": "attention_probs_dropout_prob"}
P, LENGTH = 0.3, 30
SEEDS = torch.tensor([5, -(2**40)])


def dropping(name: str) -> Any:
    config = copy.deepcopy(tiny_config(name))
    setattr(config, KEYS[name], P)
    return config


def alone() -> longctx.Mesh:
    return longctx.Mesh(ring=1, data=1, world_size=1, rank=0)


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def test_equals_eager_with_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, model = tiny_model(dropping("llama"), "eager").train(), tiny_model(dropping("llama"), "longctx").train()
    attach_attention(model, alone())
    layers, index = [layer.self_attn for layer in model.model.layers], torch.arange(LENGTH)
    called = iter(layers)

    def same_mask(weights: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        seeds = layer_seeds(next(called), weights, SEEDS)
        return weights * kept(seeds, weights.shape[1], index, index, p) / (1 - p)

    logits = model(tokens(), dropout_seeds=SEEDS, use_cache=False).logits.detach()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", same_mask)
        truth = eager(tokens(), use_cache=False).logits.detach()
    assert next(called, None) is None, "every layer has dropped"
    assert float((logits - truth).abs().max()) <= tolerance("model")
    first, second = (layer_seeds(layer, torch.empty(2, 4, 1, 1), SEEDS) for layer in layers)
    assert not (first == second).any(), "every layer has its own mask"
    with torch.no_grad():
        difference = model.eval()(tokens()).logits - eager.eval()(tokens()).logits
    assert float(difference.abs().max()) <= tolerance("model"), "nothing is dropped in evaluation"


@pytest.mark.parametrize("name", list(KEYS))
def test_on_one_device_torchs_generator_decides(name: str) -> None:
    model = tiny_model(dropping(name), "longctx").train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(tokens()).logits)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(model.eval()(tokens()).logits, model(tokens()).logits), "nothing is dropped in evaluation"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_drops_the_same_again(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(dropping("llama"), "longctx").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(tokens(), use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def worker(rank: int, world: int, name: str, checkpointing: Any) -> list[float]:
    """Largest relative errors of a ring's logits and gradients against the whole sequence on one device."""
    ids = documents("packed", 2, LENGTH)
    positions = positions_of(ids)
    weights = torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mesh, models = longctx.Mesh(ring=world), []
    logits = []
    for here in (alone(), mesh):
        model = tiny_model(dropping(name), "longctx").double().train()
        attach_attention(model, here)
        if checkpointing is not None and here is mesh:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        more: dict[str, Any] = {} if name == "bert" else {"use_cache": False}
        part = [longctx.shard(x, here) for x in (tokens(), positions, weights)]
        local = longctx.shard(ids, here, pad_value=-1)
        out = model(
            input_ids=part[0], position_ids=part[1], document_ids=local, dropout_seeds=SEEDS.clone(), **more
        ).logits
        (out * part[2]).sum().backward()
        models.append(model)
        logits.append(longctx.unshard(out.detach(), here, length=LENGTH))
    errors = [(logits[1] - logits[0]).abs().max() / logits[0].abs().max()]
    for truth, ours in zip(models[0].parameters(), models[1].parameters(), strict=True):
        gradient = ours.grad.clone()
        dist.all_reduce(gradient)
        errors.append((gradient - truth.grad).abs().max() / truth.grad.abs().max().clamp(min=1e-3))
    return [float(x) for x in errors]


@pytest.mark.parametrize(
    "world, name, checkpointing",
    [
        (2, "llama", None),
        (3, "gpt2", None),
        (2, "bert", None),
        (4, "llama", {"use_reentrant": False}),
        (2, "gpt2", {"use_reentrant": True}),
    ],
)
def test_rings_drop_what_one_device_drops(world: int, name: str, checkpointing: Any) -> None:
    for errors in run_ranks(world, worker, name, checkpointing, timeout=240):
        assert max(errors) <= tolerance("model")


def test_a_shard_without_seeds_is_refused() -> None:
    model = tiny_model(dropping("llama"), "longctx").train()
    attach_attention(model, longctx.Mesh(ring=2, data=1, world_size=2, rank=0))
    batch = {"input_ids": tokens(), "document_ids": torch.zeros(2, LENGTH, dtype=torch.int32), "use_cache": False}
    with pytest.raises(ModelError, match="without dropout_seeds"):
        model(**batch)
    with pytest.raises(ModelError, match=r"dropout_seeds \(3,\)"):
        model(**batch, dropout_seeds=torch.arange(3))


def test_configs_that_drop_are_known() -> None:
    for name in KEYS:
        assert drops_attention(dropping(name)) and not drops_attention(tiny_config(name))

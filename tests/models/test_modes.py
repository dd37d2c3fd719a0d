"""Eval mode for a while: every module is afterwards as it was, also after an error and after generate()."""

from __future__ import annotations

import pytest
import torch
from models.zoo import tiny_config, tiny_model

import longctx
from longctx.generation.generate import generate
from longctx.models.modes import evaluating

from distributed import run_ranks


def half_frozen() -> torch.nn.Module:
    """A model in training whose first layer is in eval mode."""
    model: torch.nn.Module = tiny_model(tiny_config("llama"), "longctx").train()
    model.get_submodule("model.layers.0").eval()
    return model


def modes(model: torch.nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_every_module_gets_its_own_mode_back() -> None:
    model = half_frozen()
    before = modes(model)
    assert len(set(before.values())) == 2
    with pytest.raises(KeyError), evaluating(model):
        assert not any(modes(model).values())
        raise KeyError
    assert modes(model) == before


def generated(rank: int, world: int) -> bool:
    model, mesh = half_frozen(), longctx.Mesh(ring=world)
    before = modes(model), torch.get_rng_state()
    options = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": 63, "do_sample": True}
    generate(model, torch.arange(8)[None], mesh=mesh, **options)
    return modes(model) == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_generating_during_training_changes_neither_modes_nor_random_numbers() -> None:
    assert all(run_ranks(2, generated)) and generated(0, 1)

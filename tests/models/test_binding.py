"""A binding is found on every module of its model, and stays on copies."""

from __future__ import annotations

import copy

import torch

from longctx.mesh import Mesh
from longctx.models.hook.binding import Binding, binding_of, module_index


def test_every_module_knows_its_binding_and_its_place() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert binding_of(model[0]) is None and module_index(model[0]) == 0
    binding = Binding(Mesh(ring=2, world_size=2), "zigzag")
    binding.bind(model)
    assert all(binding_of(module) is binding for module in model.modules())
    assert [module_index(module) for module in model.modules()] == [0, 1, 2, 3]


def test_a_copied_model_keeps_the_same_binding() -> None:
    model = torch.nn.Linear(2, 2)
    binding = Binding(Mesh(world_size=1), "zigzag")
    binding.bind(model)
    assert binding_of(copy.deepcopy(model)) is binding


def test_only_several_ranks_of_a_sequence_are_a_shard() -> None:
    assert Binding(Mesh(ulysses=2, world_size=2), "zigzag").sharded
    assert not Binding(Mesh(world_size=2), "zigzag").sharded


def test_an_unbound_layer_is_known_by_its_index() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.layer_idx = 3  # type: ignore[assignment]
    assert module_index(layer) == 3

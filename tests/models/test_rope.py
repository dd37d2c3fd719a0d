"""Rotary frequencies stay in fp32, and follow the largest position that is no padding."""

from __future__ import annotations

import torch
from models.zoo import tiny_config, tiny_model

from longctx.mesh import Mesh
from longctx.models.hook.binding import Binding
from longctx.models.hook.rope import Rotary, attach_rope


def test_a_cast_to_bf16_leaves_the_frequencies_of_the_config() -> None:
    model = tiny_model(tiny_config("llama"), "sdpa")
    wanted = model.model.rotary_emb.inv_freq.clone()
    model = model.bfloat16()
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), wanted)
    binding = Binding(Mesh(world_size=1), "zigzag")
    attach_rope(model, binding)
    model(input_ids=torch.arange(8)[None])
    assert torch.equal(model.model.rotary_emb.inv_freq, wanted)
    assert len(binding.handles) == 2


def test_dynamic_frequencies_follow_this_batch_alone() -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = tiny_config("llama", rope_parameters=scaling)
    model = tiny_model(config, "sdpa")
    attach_rope(model, Binding(Mesh(world_size=1), "zigzag"))
    rotary, short = model.model.rotary_emb, torch.arange(8)[None]
    rotary(torch.zeros(1, 8, 8), position_ids=short)
    first = rotary.inv_freq.clone()
    rotary(torch.zeros(1, 8, 8), position_ids=short + 4 * config.max_position_embeddings)
    assert not torch.equal(rotary.inv_freq, first)
    rotary(torch.zeros(1, 8, 8), position_ids=short)
    assert torch.equal(rotary.inv_freq, first) and rotary.rope_type == "dynamic"


def test_padding_does_not_lengthen_a_row() -> None:
    binding = Binding(Mesh(world_size=1), "zigzag")
    rotary = Rotary(tiny_model(tiny_config("llama"), "sdpa").model.rotary_emb, binding)
    positions = torch.tensor([[0, 1, 2, 99]])
    assert int(rotary.true_length(positions)) == 100
    binding.document_ids = torch.tensor([[0, 0, 0, -1]])
    assert int(rotary.true_length(positions)) == 3

"""What is wrapped around a transformers model is told from it by what it holds, not by what it is called."""

from __future__ import annotations

import torch
from models.zoo import tiny_config, tiny_model

from longctx.models.hook.wrapped import adapter_parts, inner_model, inner_models


def test_the_model_inside_is_found_unless_there_are_several() -> None:
    model = tiny_model(tiny_config("llama"), "sdpa")
    assert inner_model(model) is model
    assert inner_model(torch.nn.ModuleList([torch.nn.Linear(2, 2), model])) is model
    two = torch.nn.ModuleList([model, tiny_model(tiny_config("llama"), "sdpa")])
    assert inner_model(two) is two and len(inner_models(two)) == 2
    plain = torch.nn.Linear(2, 2)
    assert inner_model(plain) is plain and inner_model("no module") == "no module"


def test_adapters_are_what_stands_beside_a_base_layer() -> None:
    import peft

    model = tiny_model(tiny_config("llama"), "sdpa")
    before = {id(part) for part in model.modules()}
    settings = peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, settings)
    parts = adapter_parts(adapted)
    projection = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert {id(projection.lora_A.default), id(projection.lora_magnitude_vector.default)} <= parts
    assert not parts & before  # nothing of the model itself
    assert adapter_parts(model.model.embed_tokens) == set()

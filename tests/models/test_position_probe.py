"""How a model counts positions is found by running it, and a model that counts tokens of a shard is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.every_class import small_model

import longctx
from longctx.errors import ModelError
from longctx.models.attach import attach_attention
from longctx.models.hook.binding import binding_of
from longctx.models.hook.position_probe import position_rule
from longctx.models.hook.positions import PositionRule


def found(model: Any, ring: int = 2) -> PositionRule:
    attach_attention(model, longctx.Mesh(ring=ring, data=1, world_size=ring, rank=0))
    binding = binding_of(model)
    assert binding is not None
    return position_rule(model, binding)


@pytest.mark.parametrize("ring", [1, 2])
@pytest.mark.parametrize(
    "name, rule",
    [
        ("LlamaForCausalLM", PositionRule()),
        ("GPT2LMHeadModel", PositionRule()),
        ("GPTNeoXForCausalLM", PositionRule()),
        ("BertForMaskedLM", PositionRule()),
        ("OPTForCausalLM", PositionRule("mask")),
        ("RobertaForMaskedLM", PositionRule("tokens", 2, 1)),
        ("EsmForMaskedLM", PositionRule("tokens", 2, 1)),
    ],
)
def test_how_a_model_counts(name: str, rule: PositionRule, ring: int) -> None:
    assert found(small_model(name), ring) == rule


def test_bfloat16_counts_alike() -> None:
    assert found(small_model("RobertaForMaskedLM").bfloat16()) == PositionRule("tokens", 2, 1)
    assert found(small_model("OPTForCausalLM").bfloat16()) == PositionRule("mask")
    assert found(small_model("LlamaForCausalLM").bfloat16()) == PositionRule()


@pytest.mark.parametrize(
    "name, culprit",
    [
        ("BartForCausalLM", "BartLearnedPositionalEmbedding .*counts its input tokens"),
        ("BlenderbotForCausalLM", "BlenderbotLearnedPositionalEmbedding .*counts its input tokens"),
        ("TrOCRForCausalLM", "TrOCRAttention .*raised ValueError"),
        ("DeepseekV4ForCausalLM", "DeepseekV4Attention .*raised"),
        ("MambaForCausalLM", "MambaMixer"),
    ],
)
def test_what_counts_tokens_or_mixes_them_is_refused_by_name(name: str, culprit: str) -> None:
    with pytest.raises(ModelError, match=f"{name}.*{culprit}"):
        found(small_model(name))


class Counting(torch.nn.Module):
    """An embedding that adds the number of each token among those that it is given; no class of transformers does."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(tokens)
        return out + 0.1 * torch.arange(tokens.shape[1])[None, :, None]


def test_a_module_that_no_list_could_name_is_found() -> None:
    model = small_model("LlamaForCausalLM")
    model.model.embed_tokens = Counting(model.model.embed_tokens)
    with pytest.raises(ModelError, match=r"Counting \(model.embed_tokens\)"):
        found(model)


def test_the_probe_leaves_nothing_behind() -> None:
    model = small_model("LlamaForCausalLM").train()
    model.model.layers[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    found(model)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after, binding = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()), binding_of(model)
    assert binding is not None and after - hooks == len(binding.handles), "what attaching adds, and nothing else"
    assert all(parameter.grad is None for parameter in model.parameters())

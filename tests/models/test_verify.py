"""Nothing silently local: what a sharded model would get wrong is refused by the name of the class or keyword."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from models.zoo import tiny_config, tiny_model

import longctx
from longctx.errors import ModelError
from longctx.models.attach import attach_attention

from distributed import run_ranks

IDS = torch.zeros(1, 8, dtype=torch.int32)
INPUT = {"input_ids": torch.arange(8)[None], "position_ids": torch.arange(8)[None], "document_ids": IDS}
SIZES: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)


def half_of_two() -> longctx.Mesh:
    """Rank 0's view of a ring of two; enough for whatever is refused before or without a message."""
    return longctx.Mesh(ring=2, data=1, world_size=2, rank=0)


@pytest.fixture
def mute_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that sends nothing, for hybrids whose attention layers come before the refusal."""
    import longctx.models.hook.attention as hook

    def silent(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    monkeypatch.setattr(hook, "ring_attention", silent)


GROUPED: dict[str, Any] = dict(**SIZES, num_key_value_heads=2, head_dim=8, intermediate_size=64, pad_token_id=0)
EXPERTS: dict[str, Any] = dict(num_experts=2, num_experts_per_tok=1)
MAMBA: dict[str, Any] = dict(attn_layer_offset=0, attn_layer_period=2, use_mamba_kernels=False, mamba_d_state=8)
DELTA: dict[str, Any] = {f"linear_{what}": 8 for what in ("key_head_dim", "value_head_dim")} | {
    f"linear_{what}": 2 for what in ("num_key_heads", "num_value_heads")
}
BYPASSES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("Bloom", dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=64), "BloomAttention"),
    "mamba": ("Mamba", dict(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=8), "MambaMixer"),
    "falcon": ("Falcon", SIZES, "FalconAttention"),
    "mpt": ("Mpt", dict(d_model=32, n_layers=2, n_heads=4, vocab_size=64), "MptAttention"),
    "rwkv": ("Rwkv", dict(hidden_size=32, num_hidden_layers=2, vocab_size=64), "RwkvSelfAttention"),
    "jamba": ("Jamba", GROUPED | EXPERTS | MAMBA, "JambaMambaMixer"),
    "qwen3_next": (
        "Qwen3Next",
        GROUPED
        | EXPERTS
        | DELTA
        | dict(moe_intermediate_size=16, shared_expert_intermediate_size=16)
        | dict(layer_types=["full_attention", "linear_attention"]),
        "Qwen3NextGatedDeltaNet",
    ),
    "lfm2": ("Lfm2", GROUPED | dict(layer_types=["full_attention", "conv"]), "Lfm2ShortConv"),
}


@pytest.mark.parametrize("name", list(BYPASSES))
def test_models_that_bypass_the_hook(name: str, mute_ring: None) -> None:
    family, sizes, culprit = BYPASSES[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    attach_attention(model, half_of_two())
    with torch.no_grad(), pytest.raises(ModelError, match=culprit):
        model(**INPUT, use_cache=False)


@pytest.mark.parametrize("keyword, message", [("position_bias", "additive position bias"), ("indices", "not know it")])
def test_keywords_that_are_not_honoured(keyword: str, message: str) -> None:
    from longctx.models.hook.attention import longctx_attention

    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(ModelError, match=f"{keyword}=.*{message}"):
        longctx_attention(torch.nn.Identity(), q, q, q, None, **{keyword: torch.zeros(1, 2, 8, 8)})


def test_encoder_decoders_are_refused() -> None:
    longctx.register()
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, attn_implementation="longctx"))
    bart = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=64, attn_implementation="longctx",
    )  # fmt: skip
    for model in (t5.eval(), transformers.BartForConditionalGeneration(bart).eval()):
        with torch.no_grad(), pytest.raises(ModelError, match="position_bias|encoder-decoder"):
            model(input_ids=torch.arange(8)[None], decoder_input_ids=torch.arange(8)[None])
        with pytest.raises(ModelError, match="encoder-decoder"):
            attach_attention(model, half_of_two())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"document_ids": None}, "without document_ids"),
        ({"document_ids": IDS[:, :4]}, r"document_ids has shape \(1, 4\)"),
        ({"use_cache": True}, "cache on a shard"),
        ({"labels": torch.arange(8)[None]}, "labels without shift_labels"),
        ({"logits_to_keep": 1}, "logits_to_keep"),
        ({"attention_mask": torch.zeros(1, 1, 8, 8)}, "no T x T mask"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_calls_that_a_shard_cannot_honour(change: dict[str, Any], message: str) -> None:
    model = tiny_model(tiny_config("llama"), "longctx")
    attach_attention(model, half_of_two())
    with pytest.raises(ModelError, match=message):
        model(**{**INPUT, "use_cache": False, **change})


def test_heads_that_pick_a_token_are_refused(mute_ring: None) -> None:
    config = copy.deepcopy(tiny_config("llama", pad_token_id=0))
    with pytest.raises(ModelError, match="LlamaForSequenceClassification"):
        attach_attention(transformers.LlamaForSequenceClassification(config), half_of_two())
    bert = transformers.BertModel(tiny_config("bert"))
    attach_attention(bert, half_of_two())
    with pytest.raises(ModelError, match="BertPooler"):
        bert(**INPUT)
    with pytest.raises(ModelError, match="no module with a transformers config"):
        attach_attention(torch.nn.Linear(2, 2), half_of_two())
    mixtral = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, intermediate_size=64, num_local_experts=2)
    mixtral.output_router_logits = True
    with pytest.raises(ModelError, match="output_router_logits"):
        attach_attention(transformers.MixtralForCausalLM(mixtral), half_of_two())


def hybrid_worker(rank: int, world: int) -> str:
    family, sizes, _ = BYPASSES["jamba"]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**sizes))
    attach_attention(model, longctx.Mesh(ring=world))
    try:
        model(**INPUT, use_cache=False)
    except ModelError as error:
        return str(error)
    return "accepted"


def test_every_rank_refuses_alike_and_none_hangs() -> None:
    first, second = run_ranks(2, hybrid_worker, timeout=240)
    assert first == second and "JambaMambaMixer" in first


def test_one_device_may_run_what_a_shard_may_not() -> None:
    family, sizes, _ = BYPASSES["mamba"]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**sizes))
    attach_attention(model, longctx.Mesh(ring=1, data=1, world_size=1))
    with torch.no_grad():
        model(torch.arange(8)[None])

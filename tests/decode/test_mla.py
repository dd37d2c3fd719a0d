"""DeepSeek's attention (MLA) as an instance of EL: the latent is the hidden state, with rotary columns beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from longctx.decode.el import expanded_attention

from tolerances import tolerance

HEADS, NOPE, ROTARY, LATENT, VALUE, TOKENS = 4, 6, 4, 10, 5, 9


def attention(rank: int | None) -> Any:
    config = DeepseekV3Config(
        hidden_size=24, num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=LATENT, q_lora_rank=rank,
        qk_nope_head_dim=NOPE, qk_rope_head_dim=ROTARY, v_head_dim=VALUE, vocab_size=32, num_hidden_layers=1,
    )  # fmt: skip
    config._attn_implementation = "sdpa"  # eager takes its softmax in fp32
    torch.manual_seed(0)
    module = theirs.DeepseekV3Attention(config, 0).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def angles(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = theirs.DeepseekV3RotaryEmbedding(module.config)(torch.zeros(1), torch.arange(TOKENS)[None])
    return cos.double(), sin.double()


def absorbed(module: Any, x: torch.Tensor, start: int, latents: list[torch.Tensor]) -> torch.Tensor:
    """Attend x, the tokens from ``start`` on, with a cache of only latents and rotated columns."""
    made = module.q_proj(x) if module.q_proj is not None else module.q_b_proj(module.q_a_layernorm(module.q_a_proj(x)))
    q, q_turned = made.unflatten(-1, (HEADS, -1)).transpose(1, 2).split((NOPE, ROTARY), -1)
    latent, k_turned = module.kv_a_proj_with_mqa(x).split((LATENT, ROTARY), -1)
    cos, sin = (angle[:, start : start + x.shape[1]] for angle in angles(module))
    q_turned, k_turned = theirs.apply_rotary_pos_emb_interleave(q_turned, k_turned[:, None], cos, sin)
    latents.append(torch.cat((module.kv_a_layernorm(latent), k_turned[:, 0]), -1))
    kept, turned = torch.cat(latents, 1).split((LATENT, ROTARY), -1)
    w_k, w_v = (w.flatten(0, 1) for w in module.kv_b_proj.weight.unflatten(0, (HEADS, -1)).split((NOPE, VALUE), 1))
    out = expanded_attention(
        q, kept, w_k, w_v, rotary=(q_turned, turned), scale=module.scaling, causal=True, tile=4
    )[0]  # fmt: skip
    return module.o_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rank", [None, 7])
def test_forward_and_steps_equal_the_models_own(rank: int | None) -> None:
    module = attention(rank)
    x = torch.randn(2, TOKENS, 24, dtype=torch.float64)
    mask = torch.full((TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    limit = tolerance("fp64")
    with torch.no_grad():
        whole = module(x, angles(module), mask)[0]
        torch.testing.assert_close(absorbed(module, x, 0, []), whole, rtol=limit, atol=limit)
        latents: list[torch.Tensor] = []
        steps = [absorbed(module, x[:, a:b], a, latents) for a, b in ((0, 4), *((t, t + 1) for t in range(4, TOKENS)))]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=limit, atol=limit)
    assert sum(x.numel() for x in latents) == 2 * TOKENS * (LATENT + ROTARY)

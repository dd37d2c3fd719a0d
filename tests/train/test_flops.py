"""Model FLOPs against counts by hand and torch's counter."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from longctx.train.report import flops


def description(**changes: object) -> SimpleNamespace:
    sizes = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    values = sizes | {"tie_word_embeddings": True} | changes
    return SimpleNamespace(**values, to_dict=lambda: values)


def test_pairs_count_what_causal_attention_sees() -> None:
    batch = {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]]),
        "document_ids": torch.tensor([[0, 0, 0, 1, 1, -1]]),
    }
    assert flops.FlopsModel(description(), 0).pairs(batch) == 6 + 3
    assert flops.FlopsModel(description(sliding_window=2), 0).pairs(batch) == 5 + 3
    mixed = description(
        sliding_window=2, num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    )
    assert flops.FlopsModel(mixed, 0).pairs(batch) == 2 * 8 + 9
    off = description(sliding_window=2, use_sliding_window=False)
    assert flops.FlopsModel(off, 0).pairs(batch) == 9


def test_flops_agree_with_torchs_counter() -> None:
    """Against torch's counter on plain attention without a mask, which computes the full square of pairs."""
    from torch.utils.flop_counter import FlopCounterMode

    length, config = 16, description()
    attention = torch.nn.MultiheadAttention(
        config.hidden_size, config.num_attention_heads, bias=False, batch_first=True
    )
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    x = torch.randn(1, length, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out, _ = attention(x, x, x, need_weights=True)
        head(out).sum().backward()
    weights = sum(p.numel() for p in attention.parameters()) + head.weight.numel()
    assert flops.FlopsModel(config, weights).step(length, length * length) == counter.get_total_flops()


def test_peak_is_unknown_on_a_cpu() -> None:
    assert flops.peak_flops(torch.device("cpu"), "bf16") is None

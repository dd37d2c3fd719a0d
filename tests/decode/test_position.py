"""Biases by position: T5's and ALiBi's, against transformers' and the definition."""

from __future__ import annotations

import pytest
import torch
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from longctx.decode.position import Alibi, RelativeBias


def test_buckets_are_those_of_t5() -> None:
    right = torch.arange(-300, 300)
    for bidirectional in (True, False):
        ours = RelativeBias(torch.zeros(32, 1), 128, bidirectional).buckets(right)
        assert torch.equal(ours, T5Attention._relative_position_bucket(right, bidirectional, 32, 128))


@pytest.mark.parametrize("decoder", [True, False])
def test_the_bias_is_t5s(decoder: bool) -> None:
    config = T5Config(
        d_model=8, d_kv=4, num_heads=2, relative_attention_num_buckets=8, relative_attention_max_distance=20
    )
    config.is_decoder = decoder
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = RelativeBias(theirs.relative_attention_bias.weight, 20, bidirectional=not decoder)
    positions = torch.arange(30)
    whole = theirs.compute_bias(30, 30)[0]
    assert torch.equal(ours(positions, positions), whole)
    some = torch.tensor([7, 2, 29])
    assert torch.equal(ours(positions[5:7], some), whole[:, 5:7, some])


def test_alibi_is_symmetric_in_the_distance() -> None:
    bias = Alibi(torch.tensor([0.5, 2.0]))(torch.tensor([3, 4]), torch.tensor([5, 3, 0]))
    assert bias.tolist() == [[[-1, 0, -1.5], [-0.5, -0.5, -2]], [[-4, 0, -6], [-2, -2, -8]]]

"""Mixtures of experts are read from the keys of several families."""

from __future__ import annotations

import pytest

from longctx.models.load.experts import Experts, experts_of

BASE = {"num_hidden_layers": 8, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, None),
        ({"num_local_experts": 1}, None),
        ({"num_local_experts": 4, "num_experts_per_tok": 2}, Experts(8, 4, 2, 96)),
        ({"num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [0, 5]}, Experts(6, 4, 1, 32)),
        ({"num_experts": 4, "decoder_sparse_step": 2, "moe_intermediate_size": 32}, Experts(4, 4, 1, 32)),
        (
            {"n_routed_experts": 6, "n_shared_experts": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 3},
            Experts(5, 6, 1, 8, 16),
        ),
        (
            {"model_type": "qwen2_moe", "num_experts": 4, "shared_expert_intermediate_size": 20, "moe_k": 3},
            Experts(8, 4, 3, 96, 20, True),
        ),
        ({"num_experts": 4, "mlp_layer_types": ["dense", "sparse"] * 4}, Experts(4, 4, 1, 96)),
        ({"num_experts": 4, "moe_layers": [1, 2, 3]}, Experts(3, 4, 1, 96)),
        ({"num_experts": 4, "moe_layer_freq": [0, 1, 1, 1, 1, 1, 1, 1]}, Experts(7, 4, 1, 96)),
        ({"num_experts": 4, "moe_layer_freq": 2}, Experts(4, 4, 1, 96)),
    ],
)
def test_experts_of_a_config(settings: dict, wanted: Experts | None) -> None:
    assert experts_of(BASE | settings) == wanted


def test_weights_and_what_one_token_uses() -> None:
    experts = Experts(layers=1, count=4, active=2, inner=10, shared=6, shared_gate=True)
    router = 8 * 4 + 8  # and the gate of the shared expert
    assert experts.weights(8) == 4 * 3 * 8 * 10 + 3 * 8 * 6 + router
    assert experts.used(8) == 2 * 3 * 8 * 10 + 3 * 8 * 6 + router
    assert experts.width == 26

"""An engine gives rows the positions that its model would count by itself."""

from __future__ import annotations

from typing import Any

import torch
from engine_tiny import make_engine, run_ranks


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    )


def worker(rank: int, world: int) -> tuple[list[list[int]], int]:
    """Evaluate first, with batches on one replica only: under ZeRO-3 finding the rule is a collective of all ranks."""
    engine = make_engine(2, 3, model=roberta())
    tokens = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    rows = {"input_ids": tokens, "shift_labels": tokens, "document_ids": torch.tensor([[0] * 4 + [1] * 5])}
    found = engine.evaluate([rows] if engine.mesh.data_rank == 0 else [])
    positions = engine.unshard(engine.shard(rows)["position_ids"], length=9)
    engine.destroy()
    return positions.tolist(), found.tokens


def test_roberta_counts_from_behind_its_padding() -> None:
    for positions, tokens in run_ranks(4, worker):
        assert positions == [[2, 3, 4, 5, 2, 3, 4, 5, 6]] * 2
        assert tokens == 18

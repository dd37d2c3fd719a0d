"""DeepSpeed's training of a transformers model on a sharded sequence: UlyssesSPAttentionHF under its engine.

As in DeepSpeed's tutorial: contiguous shards with labels shifted before sharding, and the mean over ranks
weighted by their valid tokens through a differentiable all_gather (correct on ZeRO-3's default path, used here).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Step = Callable[[dict[str, torch.Tensor]], float]
NAME, PACKAGE, PINNED = "DeepSpeed Ulysses engine", "deepspeed", "0.19.8"


def load(model: torch.nn.Module, optimizer: Any, ds_config: dict[str, Any]) -> Step:
    """Wrap ``model`` (attention "sdpa"); return a function that takes a step on full rows and returns its loss."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model, core_attn_implementation="sdpa", sequence_parallel_size=ranks, micro_batch_size=1
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, mpu=mpu)
    group = mpu.get_sequence_parallel_group()

    def step(rows: dict[str, torch.Tensor]) -> float:
        length = rows["input_ids"].shape[1] // ranks
        part = slice(rank * length, (rank + 1) * length)
        shift_labels = torch.nn.functional.pad(rows["labels"], (0, 1), value=-100)[:, 1:][:, part].contiguous()
        logits = engine(
            input_ids=rows["input_ids"][:, part], position_ids=rows["position_ids"][:, part], use_cache=False
        ).logits
        loss = engine.module.loss_function(
            logits=logits, labels=None, shift_labels=shift_labels, vocab_size=engine.module.config.vocab_size
        )
        tokens = (shift_labels != -100).sum()
        losses = torch.distributed.nn.functional.all_gather(loss, group=group)
        counts = [torch.empty_like(tokens) for _ in range(ranks)]
        dist.all_gather(counts, tokens, group=group)
        mean = sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)
        engine.backward(mean)
        engine.step()
        return float(mean.detach())

    return step

"""DeepSpeed's Arctic Long Sequence Training: Ulysses, tiled loss and MLPs, checkpointing, as in its documentation.

The loss is divided by the tokens of all ranks within each tile: TiledFusedLogitsLoss runs its backward in forward and
later scales the gradient of the hidden states, but not the head's, so any incoming gradient other than 1 is wrong.
ALST offloads checkpoints to host memory; with CPU ranks they are there already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

Step = Callable[[dict[str, torch.Tensor]], float]
NAME, PACKAGE, PINNED = "DeepSpeed ALST", "deepspeed", "0.19.8"
TILE_BYTES = 32 * 2**20  # of fp32 logits, the size longctx takes on a CPU
_registered: list[Any] = []  # registering twice would run the all-to-alls twice


def load(
    model: Any, optimizer: Any, ds_config: dict[str, Any], *, parallel: bool = True, loss: bool = True, mlp: bool = True
) -> Step:
    """Wrap ``model`` (attention "sdpa"), with checkpointing; return a function that takes a step and returns its loss.

    Args:
        parallel: shard the sequence (Ulysses); else every rank computes all of it.
        loss, mlp: ALST's tiles.
    """
    import deepspeed

    deepspeed.init_distributed("gloo")
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if parallel else (1, 0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    if not parallel:
        _alone(model)
    if mlp:
        for layer in model.model.layers:
            tile_mlp(layer.mlp)
    compute = tiled_loss if loss else whole_loss
    model.forward = lambda **given: compute(model, ranks, **given)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config, mpu=_ulysses(model, ranks) if parallel else None
    )

    def step(rows: dict[str, torch.Tensor]) -> float:
        length = rows["input_ids"].shape[1] // ranks
        part = slice(rank * length, (rank + 1) * length)
        labels = F.pad(rows["labels"], (0, 1), value=-100)[:, 1:]
        loss = engine(
            input_ids=rows["input_ids"][:, part], position_ids=rows["position_ids"][:, part],
            labels=labels[:, part].contiguous(), tokens=int((labels != -100).sum()),
        )  # fmt: skip
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        if parallel:
            dist.all_reduce(mean)
        return float(mean) / ranks

    return step


def _ulysses(model: Any, ranks: int) -> Any:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    if not _registered:
        _registered.append(
            UlyssesSPAttentionHF.register_with_transformers(
                model_name_or_path=model, core_attn_implementation="sdpa", sequence_parallel_size=ranks,
                micro_batch_size=1,
            )
        )  # fmt: skip
    return _registered[0]


def _alone(model: Any) -> None:
    """Give ``model`` torch's attention under another name: register_with_transformers replaces "sdpa" globally."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("sdpa_alone", sdpa_attention_forward)
    AttentionMaskInterface.register("sdpa_alone", sdpa_mask)
    model.set_attn_implementation("sdpa_alone")


def _hidden(model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    out = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    hidden: torch.Tensor = out.last_hidden_state
    return hidden


def whole_loss(
    model: Any, ranks: int, *, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Return this rank's part of the mean loss, times ranks (ZeRO divides by them); all logits at once, in fp32."""
    logits = model.lm_head(_hidden(model, input_ids, position_ids)).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") * (ranks / tokens)


def tiled_loss(
    model: Any, ranks: int, *, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Return the same by TiledFusedLogitsLoss."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def of_tile(head: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head.lm_head(x).float(), y, reduction="sum") * (ranks / tokens)

    hidden = _hidden(model, input_ids, position_ids)
    shards = max(1, math.ceil(labels.numel() * model.config.vocab_size * 4 / TILE_BYTES))
    result: torch.Tensor = TiledFusedLogitsLoss.apply(
        of_tile, model, hidden, labels, None, shards, [model.lm_head.weight], "sum"
    )
    return result


def tile_mlp(mlp: Any) -> None:
    """Patch a Llama MLP as in the example of TiledMLP's docstring."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def of_tile(module: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))
        return out

    def forward(x: torch.Tensor) -> torch.Tensor:
        shards = math.ceil(x.shape[1] / x.shape[2])
        weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
        out: torch.Tensor = TiledMLP.apply(of_tile, mlp, x, shards, weights)
        return out

    mlp.forward = forward

"""A tiny Llama, ragged packed rows, and the single-process plain-torch training run that engines are compared with."""

from __future__ import annotations

import functools
from typing import Any

import torch

import distributed

VOCABULARY = 61
# The first engine of a pool imports DeepSpeed and a model class on every rank at once: minutes on a busy machine.
run_ranks = functools.partial(distributed.run_ranks, timeout=280)


def tiny_llama(implementation: str = "eager", seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """Return a seeded two-layer Llama with grouped-query attention, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        **overrides,
    }
    torch.manual_seed(seed)
    config = LlamaConfig(**sizes)
    config._attn_implementation = implementation
    config.use_cache = False
    return LlamaForCausalLM(config).float()


def ragged_rows(step: int, micro_batch: int, replica: int) -> dict[str, torch.Tensor]:
    """Return one replica's full rows of a micro-batch: packed documents, unequal lengths and numbers of labels.

    (2, S) input_ids, labels (−100 where ignored) and position_ids that restart at every document.
    """
    generator = torch.Generator().manual_seed(1 + 1000 * step + 10 * micro_batch + replica)
    length = 22 + 6 * micro_batch + 3 * replica + step % 3
    ids = torch.randint(0, VOCABULARY, (2, length), generator=generator)
    share = (0.95, 0.1, 0.6)[(step + micro_batch + replica) % 3]
    keep = torch.rand(2, length, generator=generator) < share
    starts = torch.rand(2, length, generator=generator) < 0.12
    starts[:, 0] = True
    index = torch.arange(length).expand(2, length)
    positions = index - index.masked_fill(~starts, 0).cummax(1).values
    return {"input_ids": ids, "labels": ids.masked_fill(~keep, -100), "position_ids": positions}


def unsharded_loss(model: torch.nn.Module, rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return (sum of token losses, number of tokens) of an eager transformers model on full packed rows."""
    from longctx.engine.step.rows import explicit_rows

    full = explicit_rows(rows)
    documents = full["document_ids"]
    length = documents.shape[1]
    visible = (documents[:, :, None] == documents[:, None, :]) & (documents[:, :, None] >= 0)
    visible &= torch.ones(length, length, dtype=torch.bool).tril()
    visible |= torch.eye(length, dtype=torch.bool)  # a padding row sees itself, so that eager's softmax stays finite
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]
    logits = model(
        input_ids=full["input_ids"], position_ids=full["position_ids"], attention_mask=mask, use_cache=False
    ).logits
    labels = full["shift_labels"]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return loss, int((labels >= 0).sum())


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1)
    return torch.optim.AdamW(parameters, lr=1e-4, eps=1e-6, weight_decay=0.01)


def train_plainly(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    replicas: int,
    accumulation: int,
    clip: float,
    rows: Any = ragged_rows,
) -> dict[str, Any]:
    """Train on the global batch in one process: the truth.

    Returns:
        losses and norms (before clipping) per step, the first step's gradients (before clipping), the final weights.
    """
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        optimizer.zero_grad()
        parts = [
            unsharded_loss(model, rows(step, index, replica))
            for index in range(accumulation)
            for replica in range(replicas)
        ]
        loss = sum(part for part, _ in parts) / max(sum(count for _, count in parts), 1)
        loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in trained.items()}
        norm = float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trained.values()])))
        if clip:
            torch.nn.utils.clip_grad_norm_(trained.values(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
        norms.append(norm)
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


def make_engine(ring: int, stage: int, *, model: Any = None, gas: int = 1, **config: Any) -> Any:
    """Return an SGD engine of a tiny Llama (or ``model``), its buckets so small that every ZeRO stage has several."""
    import longctx

    offload, memory = config.pop("offload", False), config.pop("memory", None)
    mesh = longctx.Mesh(ring=ring, ulysses=config.pop("ulysses", 1))
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 600}
    zero |= config.pop("zero", {})
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **config,
    }
    model = tiny_llama() if model is None else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer("sgd", trained)
    return longctx.initialize(model, settings, mesh, optimizer=optimizer, memory=memory)[0]


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """Return every whole weight in fp32, gathered where ZeRO-3 has cut it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}


def run_window(engine: Any, window: list[dict[str, torch.Tensor]]) -> None:
    """Take one optimizer step on a window of full rows."""
    for batch in engine.shard(window):
        engine.backward(engine(**batch).loss)
        engine.step()

"""A tiny Llama, packed rows and the definition of their loss, for trainers of Hugging Face on several ranks."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

import distributed

LENGTH, VOCABULARY = 66, 97
run_ranks = functools.partial(distributed.run_ranks, timeout=280)


def tiny_model(**overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "attn_implementation": "eager", "tie_word_embeddings": False, **overrides,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes))


def packed_rows(number: int) -> list[dict[str, torch.Tensor]]:
    """Rows of three documents each, with uneven numbers of labels."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(number):
        ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
        cuts = sorted(torch.randperm(LENGTH - 2, generator=generator)[:2].add(1).tolist())
        pieces = zip([0, *cuts], [*cuts, LENGTH], strict=True)
        positions = torch.cat([torch.arange(end - start) for start, end in pieces])
        labels = ids.masked_fill(positions == 0, -100)
        labels[torch.rand(LENGTH, generator=generator) < 0.3 * (index % 3)] = -100
        found.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return found


def collate(items: list[Any]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}


def dense_loss(model: Any, rows: list[Any], smoothing: float = 0.0) -> tuple[torch.Tensor, int]:
    """The sum of token losses of rows, each document computed alone, and the number of tokens."""
    total, count = torch.zeros(()), 0
    for row in rows:
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), LENGTH]
        for start, end in zip(starts, starts[1:], strict=False):
            if end - start < 2:
                continue
            logits = model(input_ids=row["input_ids"][None, start:end]).logits[0, :-1].float()
            labels = row["labels"][start + 1 : end]
            total = total + torch.nn.functional.cross_entropy(
                logits, labels, ignore_index=-100, reduction="sum", label_smoothing=smoothing
            )
            count += int((labels != -100).sum())
    return total, count


def reference(windows: list[list[Any]], *, model: Any = None, lr: float = 0.5, smoothing: float = 0.0) -> Any:
    """Train on the definition in one process: (losses, gradient norms, model)."""
    model = tiny_model() if model is None else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr)
    losses, norms = [], []
    for rows in windows:
        total, count = dense_loss(model, rows, smoothing)
        optimizer.zero_grad()
        (total / count).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        losses.append(float(total.detach()) / count)
        optimizer.step()
    return losses, norms, model


def deepspeed_config(stage: int, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
        "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 600,
            "stage3_prefetch_bucket_size": 5000, **zero,
        },
    }  # fmt: skip


FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def arguments(folder: str, backend: str, **given: Any) -> dict[str, Any]:
    """Keywords of TrainingArguments: SGD, clipped at 1, one row per micro-batch, in order."""
    clean_state()
    strategy: dict[str, Any] = {}
    if backend.startswith("zero"):
        strategy = {"deepspeed": deepspeed_config(int(backend[4]))}
    elif backend == "fsdp2":
        strategy = FSDP2
    return {
        "output_dir": folder, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 0.5, "optim": "sgd",
        "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "train_sampling_strategy": "sequential", "bf16": False, **strategy, **given,
    }  # fmt: skip


def clean_state() -> None:
    """Forget what accelerate and transformers keep in globals, as a new process would."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def history(trainer: Any) -> dict[str, list[float]]:
    log = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in log if "grad_norm" in entry],
        "evaluations": [entry["eval_loss"] for entry in log if "eval_loss" in entry],
        "input_tokens": [entry["num_input_tokens_seen"] for entry in log if "num_input_tokens_seen" in entry],
    }


def windows_of(rows: list[Any], steps: int, size: int) -> list[list[Any]]:
    return [rows[step * size : (step + 1) * size] for step in range(steps)]


CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' t4 ' }}{% generation %}"
    "{{ message['content'] }}{% endgeneration %}{% else %}{{ ' t5 ' + message['content'] }}{% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    """One token per word t0, t1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t1"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=table, eos_token="t2", pad_token="t3", unk_token="t1")
    found.chat_template = CHAT
    return found


def words(ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in ids)

"""Hugging Face's Trainer with sequences of 1,024 tokens that are sharded over all ranks.

torchrun --standalone --nproc-per-node 2 examples/huggingface_trainer.py
"""

import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import longctx

LENGTH = 1024

# One token per byte; labels are input_ids, and the model shifts them.
text = torch.tensor(list((Path(__file__).parents[1] / "LICENSE").read_bytes()))
rows = [{"input_ids": row, "labels": row} for row in text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)]

args = TrainingArguments(
    output_dir="runs/huggingface_trainer",
    per_device_train_batch_size=1,  # rows per data replica; all ranks of a ring share one row
    gradient_accumulation_steps=2,
    max_steps=5,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
    # deepspeed="zero3.json" or fsdp=True work alike
)

torch.manual_seed(0)  # every rank starts with the same weights
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=LENGTH, tie_word_embeddings=True,
)  # fmt: skip
trainer = longctx.hf.Trainer(
    model=LlamaForCausalLM(config),
    args=args,
    train_dataset=rows[:10],
    eval_dataset=rows[-1:],
    mesh=longctx.Mesh(ring=int(os.environ.get("WORLD_SIZE", 1))),  # the one line that longctx adds
)
trainer.train()
evaluation = trainer.evaluate()
if trainer.is_world_process_zero():
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in losses:
        print(f"step {entry['step']}: loss {entry['loss']:.5f}, gradient norm {entry['grad_norm']:.5f}")
    print(f"evaluation: loss {evaluation['eval_loss']:.5f}")

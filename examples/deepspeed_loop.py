"""A training loop on DeepSpeed: ZeRO-3, two micro-batches per optimizer step, sequences sharded over all ranks.

torchrun --standalone --nproc-per-node 2 examples/deepspeed_loop.py      # or deepspeed, mpirun, srun
"""

import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longctx

LENGTH = 1024
STEPS = 5

mesh = longctx.Mesh(ring=int(os.environ.get("WORLD_SIZE", 1)))  # initialize() connects it

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=LENGTH, tie_word_embeddings=True,
)  # fmt: skip
model = LlamaForCausalLM(config)

# DeepSpeed's own configuration. "Per GPU" means per data replica here: the ranks of one ring share each row.
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 3},
    "steps_per_print": 10**9,
}
engine, *_ = longctx.initialize(model=model, config=settings, mesh=mesh)

text = torch.tensor(list((Path(__file__).parents[1] / "LICENSE").read_bytes()))


def micro_batch(index: int) -> dict[str, torch.Tensor]:
    """Return one whole row (1, S). The ranks of a ring read the same row, data replicas read different ones."""
    start = (index * mesh.data_size + mesh.data_rank) * LENGTH % (len(text) - LENGTH)
    ids = text[None, start : start + LENGTH]
    return {"input_ids": ids, "labels": ids}  # labels are not shifted here: engine.shard shifts them


for step in range(STEPS):
    # Give shard() all micro-batches of one optimizer step at once: it counts the valid labels of all of them on all
    # ranks, so that every token has the same weight in the loss however unevenly tokens are spread.
    window = [micro_batch(2 * step), micro_batch(2 * step + 1)]
    for batch in engine.shard(window):
        loss = engine(**batch).loss  # this rank's share of the window's loss
        engine.backward(loss)
        engine.step()  # updates the weights at the last micro-batch of the window
    if mesh.rank == 0:
        print(f"step {step + 1}: loss {engine.global_loss:.5f}, gradient norm {engine.grad_norm:.5f}")

# A forward pass outside training, on the same weights. evaluate() is called on all ranks.
result = engine.evaluate([micro_batch(0)])
if mesh.rank == 0:
    print(f"evaluation: loss {result.loss:.5f} over {result.tokens} tokens")

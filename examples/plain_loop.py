"""A training loop in plain PyTorch, without DeepSpeed: one sequence of 2,048 tokens, sharded over all ranks.

It shows what longctx.windows does for a loop (see the README): shifting, sharding, positions, documents, one loss.

python examples/plain_loop.py                                            # one process
torchrun --standalone --nproc-per-node 2 examples/plain_loop.py          # the same losses, half the tokens per rank
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import longctx

LENGTH = 2048

# All ranks form one ring: each holds a part of the same sequence.
mesh = longctx.Mesh(ring=int(os.environ.get("WORLD_SIZE", 1))).connect()

torch.manual_seed(0)  # every rank holds the whole model and must start with the same weights
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=LENGTH, tie_word_embeddings=True,
)  # fmt: skip
model = LlamaForCausalLM(config).to(mesh.device)
longctx.attach(model, mesh)  # every attention layer now runs ring attention over the mesh
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# One token per byte. All ranks of a ring read the same row; shard() then keeps each rank's own tokens.
text = (Path(__file__).parents[1] / "LICENSE").read_bytes()
ids = torch.tensor(list(text[:LENGTH]), device=mesh.device)[None]  # (B = 1, S)
# Shift labels before sharding: the token that follows a shard's last one is on another rank.
labels = F.pad(ids[:, 1:], (0, 1), value=-100)
inputs = {
    "input_ids": longctx.shard(ids, mesh),  # (B, T), T = S / ranks
    # Global positions: under the default zigzag layout a shard is two separate pieces of the sequence.
    "position_ids": longctx.positions(LENGTH, mesh).to(mesh.device)[None],
    # Which document each token belongs to, −1 at padding. Here the row is one document; packed rows have several, and
    # a token attends only within its own.
    "document_ids": longctx.shard(torch.zeros_like(ids), mesh, pad_value=-1),
}
labels = longctx.shard(labels, mesh)

for step in range(10):
    logits = model(**inputs, use_cache=False).logits  # (B, T, V)
    # Sum over this rank's tokens, divided by the tokens of all ranks: the ranks' losses add up to the global mean.
    # A mean per rank would be too large by the number of ranks.
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (LENGTH - 1)
    loss.backward()
    # For the same reason gradients are summed, not averaged. DistributedDataParallel would average them.
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach()
    dist.all_reduce(total)
    if mesh.rank == 0:
        print(f"step {step + 1}: loss {total:.5f}")

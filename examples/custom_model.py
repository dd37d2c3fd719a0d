"""A hand-written transformer (no transformers library) with exact and bounded-state attention layers, sharded.

python examples/custom_model.py                                          # one process
torchrun --standalone --nproc-per-node 2 examples/custom_model.py        # the same losses, half the tokens per rank
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import longctx

LENGTH, VOCABULARY, WIDTH, HEADS = 2048, 256, 64, 4

mesh = longctx.Mesh(ring=int(os.environ.get("WORLD_SIZE", 1))).connect()


class ExactAttention(nn.Module):
    """Causal softmax attention over the whole sequence; only the call to ring_attention knows that it is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        return self.out(longctx.ring_attention(q, k, v, mesh=mesh, causal=True).transpose(1, 2).flatten(2))


class BoundedAttention(nn.Module):
    """ABC: attention over 16 slots. Ranks exchange a state whose size does not depend on the sequence length."""

    def __init__(self) -> None:
        super().__init__()
        self.abc = longctx.nn.ABCAttention(WIDTH, HEADS, slots=16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.abc(x, mesh=mesh)


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.RMSNorm(WIDTH), attention, nn.RMSNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))  # the only operation that mixes tokens
        return x + self.mlp(self.norm2(x))


torch.manual_seed(0)  # the same weights on every rank
token, position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
for table in (token, position):
    nn.init.normal_(table.weight, std=0.02)
layers = nn.Sequential(Block(BoundedAttention()), Block(ExactAttention()), nn.RMSNorm(WIDTH))
model = nn.ModuleList([token, position, layers]).to(mesh.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

text = (Path(__file__).parents[1] / "LICENSE").read_bytes()
ids = torch.tensor(list(text[:LENGTH]), device=mesh.device)[None]
labels = longctx.shard(F.pad(ids[:, 1:], (0, 1), value=-100), mesh)  # shift first, then shard
ids, positions = longctx.shard(ids, mesh), longctx.positions(LENGTH, mesh).to(mesh.device)

for step in range(10):
    logits = layers(token(ids) + position(positions)) @ token.weight.T  # global positions, tied head
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (LENGTH - 1)
    loss.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)  # a sum: each rank's loss covers its own tokens only
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(total := loss.detach())
    if mesh.rank == 0:
        print(f"step {step + 1}: loss {total:.5f}")

"""Generate with transformers' own generate(): from cached keys and values, from hidden states (EL), over a ring.

python examples/generate.py                                              # one process: the first two
torchrun --standalone --nproc-per-node 2 examples/generate.py            # all three; two ranks share the context
"""

import os

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import longctx

mesh = longctx.Mesh(ring=int(os.environ.get("WORLD_SIZE", 1))).connect()

# Random weights are enough to compare tokens; from_pretrained(folder) works the same. EL-attention needs a model whose
# keys are not rotated by position: GPT-2, OPT, BART, T5, Marian, … but not Llama.
torch.manual_seed(0)
config = GPT2Config(
    vocab_size=256, n_positions=1024, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
)
model = GPT2LMHeadModel(config).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.15)  # far from uniform, or every choice would be nearly a tie
model.to(mesh.device)
prompt = torch.randint(256, (1, 500), device=mesh.device)
options = {"max_new_tokens": 16, "num_beams": 4, "pad_token_id": 0}


def show(name: str, tokens: torch.Tensor) -> None:
    if mesh.rank == 0:
        print(f"{name}: {tokens[0, prompt.shape[1] :].tolist()}")


expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
show("KV cache", expected)

# EL-attention caches each layer's input instead of its keys and values: half the bytes, once for all beams, and the
# same tokens.
longctx.enable_el(model)
show("EL cache", model.generate(prompt, attention_mask=torch.ones_like(prompt), **options))
longctx.disable_el(model)

# On a ring, each rank keeps the keys and values of its part of the prompt. Every rank calls generate() and gets the
# same tokens. The first call attaches the mesh to the model.
if mesh.ring_size > 1:
    show(f"KV cache over a ring of {mesh.ring_size}", longctx.generate(model, prompt, mesh=mesh, **options))

"""ring-attention-pytorch: the best-known stand-alone ring; plain PyTorch on a CPU."""

from __future__ import annotations

import torch

from benchmarks.peers import Contestant, NotMeasured, Step, by_autograd, contiguous


def load() -> Step:
    try:
        from ring_attention_pytorch.ring_flash_attention import ring_flash_attn_
    except ImportError as error:
        raise NotMeasured(f"ring-attention-pytorch does not import here: {error}") from None

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in (q, k, v))
        bucket = min(q.shape[1], 512)
        out = ring_flash_attn_(q, k, v, None, True, bucket, True, False, None, None, False, 50.0)
        return out.transpose(1, 2)

    return by_autograd(attention)


CONTESTANT = Contestant(
    "ring-attention-pytorch",
    "ring-attention-pytorch",
    "0.5.20",
    load,
    contiguous,
    longest=16384,
    dtypes=("float32",),  # its CPU path multiplies fp32 weights with values in their own dtype
)

"""torch's scaled_dot_product_attention: one process, the whole sequence. The bound that no ring on a CPU can beat."""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.peers import Contestant, Step, by_autograd, whole


def load() -> Step:
    def attention(q, k, v):  # type: ignore[no-untyped-def]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return by_autograd(attention)


ONE_THREAD = Contestant("torch SDPA, 1 thread", "torch", "2.13.0", load, whole, ranks="first", threads=1)
TWO_THREADS = Contestant("torch SDPA, 2 threads", "torch", "2.13.0", load, whole, ranks="first", threads=2)

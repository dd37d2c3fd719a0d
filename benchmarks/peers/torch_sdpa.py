"""torch's scaled_dot_product_attention over the whole sequence: a bound that no ring on a CPU can beat by much.

The same total work in three ways: one process on one core (the other idles; two hyper-threads of a core slow each other
down, so this takes less CPU time than two busy cores); one process on two cores; and the ideal, two processes with half
of the heads each and no communication.
"""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.peers import Contestant, Step, by_autograd, whole


def load() -> Step:
    def attention(q, k, v):  # type: ignore[no-untyped-def]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return by_autograd(attention)


ONE_THREAD = Contestant("torch SDPA, 1 thread", "torch", "2.13.0", load, whole, ranks="first", threads=1)
IDEAL = Contestant("torch SDPA, heads split, no exchange", "torch", "2.13.0", load, whole, split_heads=True)
TWO_THREADS = Contestant("torch SDPA, 2 threads", "torch", "2.13.0", load, whole, ranks="first", threads=2)

"""Detect, before the update, that ranks filled their reduction buckets in different orders.

ZeRO 1 and 2 copy gradients into a flat bucket in the order in which backward finishes them; ZeRO 3 sorts within each
bucket only. Buckets are then reduced by position, so if orders differ, gradients of different weights are added up
without an error. The order follows autograd's graph, so data-dependent code (a skipped layer, experts that no token
chose) can change it on one rank alone.
"""

from __future__ import annotations

import zlib
from typing import Any

from longctx.errors import EngineError

_MODULUS = 2**20  # fp64 sums of squares stay exact for 8192 ranks
_STAGES_1_AND_2 = "reduce_ipg_grads"
_STAGE_3 = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"


class ReductionOrder:
    """Digest of the buckets that this rank's optimizer has reduced since the last optimizer step.

    Args:
        optimizer: DeepSpeed's. On ZeRO 0, which reduces in parameter order, nothing is recorded.
    """

    def __init__(self, optimizer: Any) -> None:
        self._digest = 0
        # ZeRO 3 sorts a bucket before reduce-scatter, but not before all-reduce: only there does the order matter.
        sorts = getattr(optimizer, "reduce_scatter", True) or not getattr(optimizer, "contiguous_gradients", False)
        for name, ordered in ((_STAGES_1_AND_2, True), (_STAGE_3, not sorts)):
            if hasattr(optimizer, name) and hasattr(optimizer, "ipg_buckets"):
                self._watch(optimizer, name, ordered)

    def _watch(self, optimizer: Any, name: str, ordered: bool) -> None:
        """Wrap the optimizer's method ``name``, which reduces full buckets, to record their contents first."""
        reduce = getattr(optimizer, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            for bucket in optimizer.ipg_buckets.values():
                if bucket.params:
                    numbers = [getattr(entry, "ds_id", entry) for entry in bucket.params]
                    self._add(numbers if ordered else sorted(numbers))
            return reduce(*arguments, **keywords)

        setattr(optimizer, name, watched)

    def _add(self, numbers: list[Any]) -> None:
        self._digest = zlib.crc32(repr(numbers).encode(), self._digest)

    def take(self) -> list[float]:
        """Return the digest since the last step and its square, to be summed over all ranks, and reset the digest."""
        number, self._digest = float(self._digest % _MODULUS), 0
        return [number, number * number]


def check_order(total: float, squares: float, ranks: int) -> None:
    """Raise unless all ranks had the same digest.

    Args:
        total, squares: the sums over ``ranks`` ranks of what ``ReductionOrder.take`` returned.

    Raises:
        EngineError: on every rank, if the digests differ.
    """
    # (Σx)² = n·Σx² exactly if all x are equal (Cauchy-Schwarz), so two sums replace a gather.
    if int(total) ** 2 != ranks * int(squares):
        raise EngineError(
            "the ranks finished their gradients in different orders, so ZeRO has added gradients of different weights: "
            "the model takes another path on some rank's rows (a layer that is skipped, experts that no token chose). "
            "Weights are unchanged. Let every rank run the same modules whatever its rows hold, or use "
            "zero_optimization.stage 0, where the order does not matter"
        )

"""Notice when ranks put gradients into their reduction buckets in different orders, before the update.

ZeRO 1 and 2 copy gradients into a flat bucket in the order in which backward finishes them; ZeRO 3 sorts within a
bucket only. The buckets of all ranks are then added by position: where the orders differ, gradients of equally large
weights are exchanged for one another and nothing fails. The order follows the shape of autograd's graph, so any code
that chooses a path by its data (a layer that is skipped, experts that no token chose) can change it on one rank alone.
"""

from __future__ import annotations

import zlib
from typing import Any

from longctx.errors import EngineError

_MODULUS = 2**20  # fp64 sums of squares stay exact for 8192 ranks
_STAGES_1_AND_2 = "reduce_ipg_grads"
_STAGE_3 = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"


class ReductionOrder:
    """A number that stands for the buckets that this rank's optimizer reduced since the last window.

    Args:
        optimizer: DeepSpeed's. ZeRO 0 reduces in the order of the parameters, and nothing is watched there.
    """

    def __init__(self, optimizer: Any) -> None:
        self._digest = 0
        # ZeRO 3 sorts a bucket before it reduce-scatters it; what it all-reduces stays as it came.
        sorts = getattr(optimizer, "reduce_scatter", True) or not getattr(optimizer, "contiguous_gradients", False)
        for name, ordered in ((_STAGES_1_AND_2, True), (_STAGE_3, not sorts)):
            if hasattr(optimizer, name) and hasattr(optimizer, "ipg_buckets"):
                self._watch(optimizer, name, ordered)

    def _watch(self, optimizer: Any, name: str, ordered: bool) -> None:
        """Have the optimizer's function that reduces full buckets note first what they hold."""
        reduce = getattr(optimizer, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            for bucket in optimizer.ipg_buckets.values():
                if bucket.params:
                    places = [getattr(entry, "ds_id", entry) for entry in bucket.params]
                    self._add(places if ordered else sorted(places))
            return reduce(*arguments, **keywords)

        setattr(optimizer, name, watched)

    def _add(self, places: list[Any]) -> None:
        self._digest = zlib.crc32(repr(places).encode(), self._digest)

    def take(self) -> list[float]:
        """Return the window's number and its square, to be added up over all ranks, and begin the next window."""
        number, self._digest = float(self._digest % _MODULUS), 0
        return [number, number * number]


def check_order(total: float, squares: float, ranks: int) -> None:
    """Raise unless all ranks had one number.

    Args:
        total, squares: the sums over ``ranks`` ranks of what ``ReductionOrder.take`` returned.

    Raises:
        EngineError: the numbers differ; the same on every rank.
    """
    if int(total) ** 2 != ranks * int(squares):
        raise EngineError(
            "the ranks finished their gradients in different orders, so ZeRO has added gradients of different weights: "
            "the model takes another path on some rank's rows (a layer that is skipped, experts that no token chose). "
            "Weights are unchanged. Let every rank run the same modules whatever its rows hold, or use "
            "zero_optimization.stage 0, where the order does not matter"
        )

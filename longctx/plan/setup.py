"""The choices of a run that decide what it keeps and how long it takes: grid, ZeRO, tiles, recomputation, offload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from longctx.config.derived import Derived
from longctx.config.schema import RunConfig
from longctx.config.topology import weights_group
from longctx.plan.shape import ModelShape

Recompute = Literal["none", "mlp", "layer", "layer_keep_attention"]

# longctx.nn.tiling's: numbers of intermediate results that a tile may have, and the fewest tokens of one.
_GPU_TILE, _CPU_TILE, _LEAST_TILE = 2**27, 2**23, 128


@dataclass(frozen=True)
class Setup:
    """One run's choices. `tokens` is the padded length S of a row; sizes of DeepSpeed's buckets are in numbers."""

    tokens: int
    ring: int = 1
    ulysses: int = 1
    data: int = 1
    layout: str = "zigzag"
    rows: int = 1
    accumulation: int = 1
    stage: int = 3
    group: int | None = None
    """Ranks among which ZeRO-3's weights are cut once more."""
    offload_optimizer: bool = False
    swap_optimizer: bool = False
    """The offloaded optimizer is on disk, not in the host's memory."""
    offload_parameters: bool = False
    offload_checkpoints: bool = False
    recompute: Recompute = "none"
    loss_tile: int | None = None
    mlp_tile: int | None = None
    recompute_norms: bool = False
    states: int = 2
    """Numbers the optimizer keeps a weight: 2 for AdamW, 1 for SGD with momentum, 0 without."""
    on_gpu: bool = True
    overlap_comm: bool = False
    bucket: int = 500_000_000
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    persistent: int = 100_000

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence."""
        return self.ring * self.ulysses

    @property
    def world(self) -> int:
        return self.sequence * self.data

    @property
    def local(self) -> int:
        """Tokens of one row on a rank."""
        return -(-self.tokens // self.sequence)

    @property
    def n(self) -> int:
        """Tokens that a rank has at once: of all rows of a micro-batch."""
        return self.rows * self.local

    @property
    def untiled_loss(self) -> bool:
        return self.loss_tile is None


def setup_of(
    config: RunConfig, derived: Derived, shape: ModelShape, *, on_gpu: bool = True, per_node: int | None = None
) -> Setup:
    """Return the choices of a run, `auto` resolved as the run itself will resolve it.

    Args:
        on_gpu: automatic tiles are larger there.
        per_node: ranks of a node, for `zero.group: auto`; by default what the configuration or the launcher says.
    """
    memory, zero, train = config.memory, config.zero, config.train
    theirs = config.deepspeed.get("zero_optimization", {})
    return Setup(
        tokens=derived.padded_length,
        ring=derived.ring,
        ulysses=derived.ulysses,
        data=derived.data,
        layout=config.attention.layout,
        rows=derived.micro_batch,
        accumulation=derived.accumulation,
        stage=zero.stage,
        group=weights_group(config, derived.world, per_node),
        offload_optimizer=zero.offload_optimizer != "none",
        swap_optimizer=zero.offload_optimizer == "nvme",
        offload_parameters=zero.offload_parameters == "cpu" and on_gpu,
        offload_checkpoints=memory.offload_checkpoints and on_gpu,
        recompute=memory.recompute,
        loss_tile=resolve_loss_tile(memory.loss_tile, shape, on_gpu),
        mlp_tile=resolve_mlp_tile(memory.mlp_tile, shape),
        recompute_norms=memory.recompute_norms,
        states=2 if train.optimizer == "adamw" else int(train.momentum > 0),
        on_gpu=on_gpu,
        overlap_comm=zero.overlap_comm,
        **_buckets(theirs),
    )


def resolve_loss_tile(tile: Any, shape: ModelShape, on_gpu: bool) -> int | None:
    """Tokens whose logits exist at once; None: all. The rule of longctx.nn.tiling.choose_tile."""
    if tile == "none" or tile is None:
        return None
    if tile == "auto":
        return max(_LEAST_TILE, (_GPU_TILE if on_gpu else _CPU_TILE) // shape.vocab // 16 * 16)
    return int(tile)


def resolve_mlp_tile(tile: Any, shape: ModelShape) -> int | None:
    """Tokens that an MLP computes at once; None: all. The rule of longctx.models.activations.mlp."""
    if tile == "none" or tile is None:
        return None
    return max(_LEAST_TILE, shape.hidden // 2) if tile == "auto" else int(tile)


def _buckets(zero: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's bucket sizes where the raw block sets them."""
    names = {
        "reduce_bucket_size": "bucket",
        "stage3_prefetch_bucket_size": "prefetch",
        "stage3_max_live_parameters": "live",
        "stage3_param_persistence_threshold": "persistent",
    }
    return {ours: int(zero[theirs]) for theirs, ours in names.items() if theirs in zero}

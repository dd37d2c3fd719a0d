"""The settings of a run that decide its memory and time: grid, ZeRO, tiles, recomputation, offload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from longctx.config.derived import Derived
from longctx.config.schema import RunConfig
from longctx.config.topology import weights_group
from longctx.plan.shape import ModelShape

Recompute = Literal["none", "mlp", "layer", "layer_keep_attention"]

# As in longctx.nn.tiling: the most elements of a tile's intermediates, and the fewest tokens of a tile.
_GPU_TILE, _CPU_TILE, _LEAST_TILE = 2**27, 2**23, 128


@dataclass(frozen=True)
class Setup:
    """One run's settings. `tokens` is the padded length S of a row; DeepSpeed's bucket sizes are in elements."""

    tokens: int
    ring: int = 1
    ulysses: int = 1
    data: int = 1
    layout: str = "zigzag"
    rows: int = 1
    accumulation: int = 1
    stage: int = 3
    group: int | None = None
    """Ranks over which ZeRO-3's secondary (hpZ) shards are spread; None: no secondary shards."""
    offload_optimizer: bool = False
    swap_optimizer: bool = False
    """Whether the offloaded optimizer is on NVMe instead of in host memory."""
    offload_parameters: bool = False
    offload_checkpoints: bool = False
    recompute: Recompute = "none"
    loss_tile: int | None = None
    mlp_tile: int | None = None
    recompute_norms: bool = False
    states: int = 2
    """Optimizer states per weight: 2 for AdamW, 1 for SGD with momentum, 0 for SGD without."""
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
        """Tokens of one row per rank."""
        return -(-self.tokens // self.sequence)

    @property
    def n(self) -> int:
        """Tokens per rank in one micro-batch."""
        return self.rows * self.local


def setup_of(
    config: RunConfig, derived: Derived, shape: ModelShape, *, on_gpu: bool = True, per_node: int | None = None
) -> Setup:
    """Return the settings of a run, with `auto` resolved as the run itself resolves it.

    Args:
        on_gpu: plan for GPUs, where automatic tiles are larger.
        per_node: ranks per node, for `zero.group: auto`; default: from the configuration or the launcher.
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
    """Return the tokens per tile of logits, or None for all tokens, by the rule of longctx.nn.tiling.choose_tile."""
    if tile == "none" or tile is None:
        return None
    if tile == "auto":
        return max(_LEAST_TILE, (_GPU_TILE if on_gpu else _CPU_TILE) // shape.vocab // 16 * 16)
    return int(tile)


def resolve_mlp_tile(tile: Any, shape: ModelShape) -> int | None:
    """Return the tokens per MLP tile, or None for all tokens, by the rule of longctx.models.activations.mlp."""
    if tile == "none" or tile is None:
        return None
    return max(_LEAST_TILE, shape.hidden // 2) if tile == "auto" else int(tile)


def _buckets(zero: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's bucket sizes, where the configuration's `deepspeed` section sets them."""
    names = {
        "reduce_bucket_size": "bucket",
        "stage3_prefetch_bucket_size": "prefetch",
        "stage3_max_live_parameters": "live",
        "stage3_param_persistence_threshold": "persistent",
    }
    return {ours: int(zero[theirs]) for theirs, ours in names.items() if theirs in zero}

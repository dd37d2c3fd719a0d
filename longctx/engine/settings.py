"""Check a DeepSpeed configuration against the mesh.

DeepSpeed ignores unknown top-level keys, and some known keys would split the ranks differently from the mesh without an
error. Both raise here, with the key's name.
"""

from __future__ import annotations

import copy
import difflib
import json
from pathlib import Path
from typing import Any

from longctx.errors import EngineError
from longctx.mesh import Mesh

Settings = dict[str, Any]

_KNOWN = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
    optimizer scheduler fp16 bf16 bfloat16 amp torch_autocast data_types zero_optimization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer gradient_clipping prescale_gradients gradient_predivide_factor gradient_allreduce_op
    sparse_gradients communication_data_type seq_parallel_communication_data_type sequence_parallel_size
    data_parallel_size steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level seed
    disable_allgather dataloader_drop_last checkpoint load_universal_checkpoint use_node_local_storage
    activation_checkpointing tensorboard wandb csv_monitor comet monitor flops_profiler comms_logger aio autotuning
    elasticity compression_training data_efficiency curriculum_learning progressive_layer_drop eigenvalue
    quantize_training sparse_attention pipeline hybrid_engine tensor_parallel inference compile graph_harvesting
    use_data_before_expert_parallelism timers nebula zenflow disable_python_gc keep_in_fp32_modules
    expert_parallel vocabulary_size weight_quantization datastates_ckpt""".split()
)


def load_settings(config: Any, mesh: Mesh) -> Settings:
    """Return a checked copy of a DeepSpeed configuration with batch sizes and sequence_parallel_size filled in.

    Args:
        config: a dictionary, or the path of a JSON file.
        mesh: whose data_size enters the batch sizes, and whose ring × ulysses is sequence_parallel_size.

    Raises:
        EngineError: a key is misspelt, contradicts the mesh, or enables a feature that is wrong on sharded sequences.
    """
    settings = _read(config)
    _check_names(settings)
    _check_sequence(settings, mesh)
    _check_batches(settings, mesh)
    _check_features(settings)
    _check_group(settings, mesh)
    return settings


def group_size(settings: Settings) -> int:
    """Return the number of ranks that share a secondary (hpZ) copy of the weights; 1 without such a copy."""
    return (settings.get("zero_optimization") or {}).get("zero_hpz_partition_size", 1) or 1


def parts_of(world: int) -> str:
    """Return advice: the group sizes over which a secondary copy of the weights may be sharded."""
    sizes = ", ".join(str(size) for size in range(2, world // 2 + 1) if world % size == 0)
    found = f"use one of {sizes}" if sizes else "remove the key"
    return f"neighbouring ranks in groups that divide the world of {world} and are smaller than it: {found}"


def _read(config: Any) -> Settings:
    if isinstance(config, dict):
        return copy.deepcopy(config)
    if isinstance(config, (str, Path)):
        try:
            settings = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise EngineError(f"DeepSpeed configuration {str(config)!r} cannot be read as JSON: {error}") from error
        if isinstance(settings, dict):
            return settings
    raise EngineError(f"config={config!r}: give DeepSpeed's configuration as a dictionary or the path of a JSON file")


def _check_names(settings: Settings) -> None:
    """Raise for a probable misspelling, which DeepSpeed would ignore. Names unlike any known one may be newer keys."""
    for key in settings:
        if key in _KNOWN:
            continue
        close = difflib.get_close_matches(str(key), _KNOWN, 1, 0.75)
        if close:
            raise EngineError(f"DeepSpeed configuration key {key!r} is unknown; did you mean {close[0]!r}?")


def _check_sequence(settings: Settings, mesh: Mesh) -> None:
    given = settings.get("sequence_parallel_size")
    if given not in (None, mesh.sequence_size):
        raise EngineError(
            f"sequence_parallel_size: {given} contradicts the mesh, which splits a sequence over ring {mesh.ring_size} "
            f"x ulysses {mesh.ulysses_size} = {mesh.sequence_size} ranks; leave the key out"
        )
    settings["sequence_parallel_size"] = mesh.sequence_size
    # With both keys set DeepSpeed builds its own mesh, on which weights of sequence ranks diverge.
    data = settings.pop("data_parallel_size", None)
    if data not in (None, mesh.data_size):
        raise EngineError(f"data_parallel_size: {data} contradicts the mesh's data={mesh.data_size}; leave the key out")


def _check_batches(settings: Settings, mesh: Mesh) -> None:
    """Fill in the batch sizes: train_batch_size = train_micro_batch_size_per_gpu · accumulation · data replicas."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for name in names:
        value = settings.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise EngineError(f"{name}: {value!r}; a positive integer is needed (rows per data replica, not per rank)")
    total, micro, steps = (settings.get(name) for name in names)
    if total is not None and (micro is None or steps is None):
        known = mesh.data_size * (micro or steps or 1)
        if total % known:
            raise EngineError(
                f"train_batch_size: {total} is not a multiple of {known} (data replicas {mesh.data_size}"
                + (f" x train_micro_batch_size_per_gpu {micro})" if micro else f" x accumulation {steps or 1})")
            )
        micro, steps = micro or total // known, steps or (total // known if micro else 1)
    micro, steps = micro or 1, steps or 1
    product = micro * steps * mesh.data_size
    if total not in (None, product):
        raise EngineError(
            f"train_batch_size: {total} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{steps} x data replicas {mesh.data_size} = {product}. The ranks of one sequence (ring x ulysses = "
            f"{mesh.sequence_size}) share a row and are not counted"
        )
    settings.update(zip(names, (product, micro, steps), strict=True))


def _check_group(settings: Settings, mesh: Mesh) -> None:
    """Check the hpZ size: DeepSpeed ignores it below stage 3, and shards over the whole world if it is too large."""
    size, stage = group_size(settings), (settings.get("zero_optimization") or {}).get("stage", 0)
    key = f"zero_optimization.zero_hpz_partition_size: {size!r}"
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise EngineError(f"{key}; give a number of neighbouring ranks, or remove the key")
    if size > 1 and stage != 3:
        raise EngineError(f"{key}; ZeRO stage {stage} does not shard weights: use stage 3, or remove the key")
    if size > 1 and (size >= mesh.world_size or mesh.world_size % size):
        raise EngineError(f"{key}; {parts_of(mesh.world_size)}")


def _check_features(settings: Settings) -> None:
    def enabled(section: str, key: str = "enabled") -> Any:
        value = settings.get(section)
        return value.get(key) if isinstance(value, dict) else value

    refusals = [
        (
            settings.get("managed_gradient_accumulation", True) is False,
            "managed_gradient_accumulation: false",
            "the loss is normalised over a window of known size; set gradient_accumulation_steps",
        ),
        (
            (enabled("tensor_parallel", "autotp_size") or 0) > 1,
            "tensor_parallel.autotp_size",
            "the mesh has no tensor-parallel axis; remove the section",
        ),
        (
            enabled("compile", "deepcompile"),
            "compile.deepcompile",
            "its passes replace the gradient reduction that the probe measures; use torch.compile on the model",
        ),
        (enabled("hybrid_engine"), "hybrid_engine", "its inference path does not support sharded sequences; remove it"),
        (enabled("expert_parallel"), "expert_parallel", "the mesh has no expert axis; remove the section"),
        (
            enabled("curriculum_learning"),
            "curriculum_learning",
            "it truncates every rank's shard, which breaks a sharded sequence; shorten the rows you pass instead",
        ),
        (
            enabled("data_efficiency"),
            "data_efficiency",
            "it samples and drops tokens per rank; sample in the dataset you pass instead",
        ),
        (
            (enabled("zero_optimization", "mics_shard_size") or 0) > 0,
            "zero_optimization.mics_shard_size",
            "DeepSpeed no longer has MiCS; remove it (zero_hpz_partition_size keeps a copy of the weights in a node)",
        ),
    ]
    for refused, key, reason in refusals:
        if refused:
            raise EngineError(f"DeepSpeed configuration {key}: {reason}")

"""Settings and classes that would be wrong on a shard are refused before training starts, with the reason."""

from __future__ import annotations

from typing import Any

from longctx.engine.global_mpu import stale_mpu
from longctx.errors import EngineError

_OVERRIDES = ("compute_loss", "training_step", "prediction_step", "evaluation_loop", "get_batch_samples")
_KNOWN = ("Trainer", "_BaseTrainer", "SFTTrainer", "DPOTrainer")


def check_class(trainer: Any) -> str:
    """Return the name of the known class that ``trainer`` is or is derived from: Trainer, SFTTrainer or DPOTrainer.

    Raises:
        EngineError: a class in between overrides a method that longctx must know.
    """
    for base in trainer.__mro__:
        ours = base.__module__.partition(".")[0] in ("transformers", "trl")
        if ours and base.__name__ in _KNOWN:
            return "Trainer" if base.__name__ == "_BaseTrainer" else str(base.__name__)
        changed = [name for name in _OVERRIDES if name in vars(base)]
        if changed and (ours or not getattr(trainer, "ring_loss", False)):
            raise EngineError(
                f"longctx.hf.ring({trainer.__name__}): {base.__name__} has a {changed[0]} of its own, which would get "
                "shards of rows instead of whole rows. "
                + ("It is not supported" if ours else "If it is right on shards, set ring_loss = True on the class")
            )
    raise EngineError(f"longctx.hf.ring({trainer.__name__}): not a transformers Trainer")


def check_trainer(trainer: Any) -> None:
    """Raise unless all settings of a trainer are right with sharded rows. No communication.

    Raises:
        EngineError: with the setting and the reason.
    """
    count = trainer.accelerator.num_processes
    if count != trainer.mesh.world_size:
        raise EngineError(
            f"accelerate counts {count} processes, the mesh {trainer.mesh.world_size} ranks: start them with torchrun "
            "or accelerate launch, and on CPUs set use_cpu=True in TrainingArguments"
        )
    refuse(_backends(trainer) | _settings(trainer))


def _backends(trainer: Any) -> dict[str, bool]:
    """Return problems of how ranks share the model, and whether each is there."""
    state = trainer.accelerator.state
    zero, fsdp = getattr(state, "deepspeed_plugin", None), getattr(state, "fsdp_plugin", None)
    config = {} if zero is None else zero.deepspeed_config
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    others = {name: getattr(parallel, name, 1) for name in ("tp_size", "cp_size", "sp_size")} if parallel else {}
    return {
        f"parallelism_config with {others}: the mesh shards sequences, and other dimensions are not supported": any(
            size > 1 for size in others.values()
        ),
        "fsdp_config version 1: FSDP2 is supported, set fsdp_config={'version': 2}": (
            fsdp is not None and getattr(fsdp, "fsdp_version", 1) != 2
        ),
        "deepspeed: sequence_parallel_size: the mesh shards sequences; leave it out": (
            config.get("sequence_parallel_size", 1) > 1
        ),
        "deepspeed: fp16 on ZeRO 0: DeepSpeed does not apply the loss scale; use ZeRO 1, or bf16": (
            (config.get("fp16") or {}).get("enabled") is True and getattr(zero, "zero_stage", 0) == 0
        ),
        "deepspeed: an earlier engine of this process was made with mpu=, and DeepSpeed would divide gradients by its "
        "sequence_parallel_size too: set deepspeed.utils.groups.mpu = None before making the trainer": (
            zero is not None and stale_mpu()
        ),
        "deepspeed: tensor_parallel: not supported together with a mesh": bool(config.get("tensor_parallel")),
        "deepspeed: compile.deepcompile: not supported": bool((config.get("compile") or {}).get("deepcompile")),
        "a model that from_pretrained(distributed_config=…) has sharded": getattr(
            trainer, "is_distributed_loading_by_transformers", False
        ),
        "several GPUs in one process (DataParallel): start one process per GPU": trainer.args.n_gpu > 1,
    }


def _settings(trainer: Any) -> dict[str, bool]:
    """Return problems of training settings, and whether each is there."""
    args, memory = trainer.args, trainer.memory
    tiled = memory.loss_tile is not None or bool(memory.z_loss)
    own_loss = trainer.compute_loss_func is not None or args.label_smoothing_factor != 0
    return {
        "neftune_noise_alpha: its noise depends on the length of the row, and a rank sees a shard": bool(
            getattr(args, "neftune_noise_alpha", None)
        ),
        "auto_find_batch_size: a rank that runs out of memory leaves the others waiting": args.auto_find_batch_size,
        "use_liger_kernel: its loss has not been verified on shards; memory={'loss_tile': 'auto'} saves the same "
        "memory": args.use_liger_kernel,
        "accelerator_config.dispatch_batches=True: rank 0 would give the ranks of a ring different rows; leave it out, "
        "and every rank reads its replica's rows itself": args.accelerator_config.dispatch_batches is True,
        "memory.loss_tile with label smoothing or compute_loss_func: a tiled loss has no logits": tiled and own_loss,
        "memory.recompute with gradient_checkpointing: both recompute layers; use one of them": (
            memory.recompute != "none" and args.gradient_checkpointing
        ),
        "memory.loss_tile with metrics on logits: a tiled loss has none; set prediction_loss_only=True": (
            tiled and trainer.compute_metrics is not None
        ),
    }


def check_sft(trainer: Any) -> None:
    """Raise for settings of TRL's SFTTrainer that would be wrong on a shard."""
    memory = trainer.memory
    refuse(
        {
            "memory.loss_tile and z_loss: SFTTrainer computes its loss in chunks already": (
                memory.loss_tile is not None or bool(memory.z_loss)
            ),
            "a vision data set: images are not sharded": trainer._is_vision_dataset,
            "router_aux_loss_coef: a load-balancing loss over the tokens of one rank": trainer.aux_loss_enabled,
        }
    )


def check_dpo(trainer: Any) -> None:
    """Raise for settings of TRL's DPOTrainer that would be wrong on a shard."""
    memory, args = trainer.memory, trainer.args
    refuse(
        {
            "memory.loss_tile and z_loss: a preference loss is no mean over tokens": (
                memory.loss_tile is not None or bool(memory.z_loss)
            ),
            "precompute_ref_log_probs: it runs before the model is sharded": args.precompute_ref_log_probs,
            "a vision data set: images are not sharded": getattr(trainer, "_is_vision_dataset", False),
            "router_aux_loss_coef: a load-balancing loss over the tokens of one rank": trainer.aux_loss_enabled,
            "padding_free: pairs are told apart by rows": bool(getattr(args, "padding_free", False)),
        }
    )


def refuse(problems: dict[str, bool]) -> None:
    """Raise for the problems that are there.

    Raises:
        EngineError: with all of them.
    """
    found = [reason for reason, there in problems.items() if there]
    if found:
        raise EngineError("longctx.hf: not supported with sharded rows:\n  " + "\n  ".join(found))

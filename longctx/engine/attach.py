"""longctx.attach: shard the sequences of an existing model or DeepSpeed engine."""

from __future__ import annotations

from typing import Any

from longctx.engine.initialize import attach_transformers_model
from longctx.errors import EngineError
from longctx.layout import Layout, get_layout
from longctx.mesh import Mesh


def attach(model_or_engine: Any, mesh: Mesh, layout: str | Layout = "zigzag", *, seed: int = 0) -> Any:
    """Attach a mesh to a transformers model or to a DeepSpeed engine, in place, and return it.

    A model's attention is replaced; do this before ``deepspeed.initialize`` or accelerate's ``prepare``. An engine's
    module is treated likewise, and the engine becomes a ``longctx.Engine`` (the same object). Its own configuration and
    mpu are probed, so gradients are also right if it was made without an mpu and divides by the world size. The trainer
    keeps calling ``engine(**batch)``, ``engine.backward(loss)`` and ``engine.step()``; its batches must go through
    ``engine.shard``. Collective over the world for an engine.

    Args:
        seed: of attention dropout, if an engine trains with it.

    Raises:
        EngineError: the engine splits its ranks differently from the mesh; engines, layouts, seeds or versions differ
            between ranks; or no factor corrects the gradients.
        ModelError: the model uses a feature that computes wrong results on a sharded sequence.
    """
    layout = get_layout(layout)
    if not _is_engine(model_or_engine):
        attach_transformers_model(model_or_engine, mesh, layout)
        return model_or_engine

    from longctx.engine.description import describe
    from longctx.engine.engine import Engine
    from longctx.engine.exchange import control_group
    from longctx.engine.gradient_probe import gradient_factor
    from longctx.sameness import compare_ranks

    engine = model_or_engine
    mesh.connect()
    control_group(mesh)
    facts: dict[str, str] = {}
    problem: Exception | None = None
    try:
        settings = _prepare(engine, mesh, layout)
        facts = describe(engine.module, settings, layout.name, seed, optimizer=engine.optimizer)
    except Exception as error:  # the other ranks wait in compare_ranks, so raise there
        problem = error
    compare_ranks(facts, problem)
    return Engine.adopt(engine, mesh, layout, gradient_factor(settings, mesh, engine.mpu), seed)


def _prepare(engine: Any, mesh: Mesh, layout: Layout) -> dict[str, Any]:
    """Check an engine against the mesh, attach its model's attention and return its settings. No communication."""
    from longctx.engine.global_mpu import check_own_size, forget_mpu
    from longctx.engine.initialize import announce_clipping
    from longctx.engine.settings import load_settings

    if getattr(engine, "mesh_device", None) is not None:
        raise EngineError(
            "this engine was made with mesh_param (or with both data_parallel_size and sequence_parallel_size in its "
            "configuration), on which the ranks of one sequence keep different gradients: make it with mpu=mesh, or "
            "with longctx.initialize"
        )
    check_own_size(engine)
    forget_mpu(engine.mpu)
    sequence = engine.sequence_parallel_size
    if sequence not in (1, mesh.sequence_size):
        raise EngineError(
            f"this engine splits sequences over {sequence} ranks, the mesh over {mesh.sequence_size}: make them equal"
        )
    attach_transformers_model(engine.module, mesh, layout)
    settings = load_settings(_own_settings(engine, mesh), mesh)
    announce_clipping(settings, mesh)
    if engine.mpu is None:
        settings.update(_without_mpu(settings, mesh))
    return settings


def _is_engine(thing: Any) -> bool:
    """Return whether ``thing`` is a DeepSpeed engine; deepspeed is not imported for this."""
    import sys

    module = sys.modules.get("deepspeed.runtime.engine")
    return module is not None and isinstance(thing, module.DeepSpeedEngine)


def _own_settings(engine: Any, mesh: Mesh) -> dict[str, Any]:
    """Return the engine's configuration with batch sizes that count rows per data replica."""
    own = dict(engine.config)
    own.update(
        train_micro_batch_size_per_gpu=engine.train_micro_batch_size_per_gpu(),
        gradient_accumulation_steps=engine.gradient_accumulation_steps(),
        sequence_parallel_size=mesh.sequence_size,
    )
    own.pop("train_batch_size", None)
    return own


def _without_mpu(settings: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Return the settings that differ without an mpu, when DeepSpeed counts every rank as a data replica."""
    micro, steps = settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]
    return {"train_batch_size": micro * steps * mesh.world_size, "sequence_parallel_size": 1}

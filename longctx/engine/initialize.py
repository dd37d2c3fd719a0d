"""longctx.initialize: DeepSpeed's initialize for a model whose sequences live on several ranks."""

from __future__ import annotations

import logging
from typing import Any

import torch

from longctx.engine.description import describe
from longctx.engine.engine import Engine
from longctx.engine.exchange import control_group
from longctx.engine.heartbeat import watch
from longctx.engine.loader import RowLoader
from longctx.engine.memory import Memory, read_memory, save_memory
from longctx.engine.probe import gradient_factor
from longctx.engine.settings import Settings, load_settings
from longctx.engine.zero.extension import load_extension
from longctx.engine.zero.fp16 import require_supported
from longctx.engine.zero.hpz import check_model, own_group
from longctx.engine.zero.nvme import mend_reads
from longctx.errors import EngineError
from longctx.layout import Layout, get_layout
from longctx.mesh import Mesh
from longctx.sameness import compare_ranks

logger = logging.getLogger(__name__)


def initialize(
    model: Any = None,
    config: Any = None,
    mesh: Mesh | None = None,
    layout: str | Layout = "zigzag",
    *,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    collate_fn: Any = None,
    seed: int = 0,
    memory: Memory | dict[str, Any] | None = None,
    args: Any = None,
    **stock: Any,
) -> tuple[Engine, Any, RowLoader | None, Any]:
    """Return ``(engine, optimizer, loader, scheduler)``, as ``deepspeed.initialize`` does. Collective over the world.

    Args:
        model: any torch module; a transformers model gets its attention swapped for ring attention over ``mesh``.
        config: DeepSpeed's configuration (a dictionary or a JSON file), unchanged by us; batch sizes count rows of a
            data replica. ``args.deepspeed_config`` serves when it is None.
        mesh: the grid of ranks, which is also DeepSpeed's mpu; None is one without a ring.
        layout: how rows are dealt out to the ring: zigzag, striped or contiguous.
        training_data: a map-style dataset of rows; ``loader`` then yields windows that are already sharded and weighed.
        collate_fn: turns a list of ``training_data``'s items into a batch of full rows.
        seed: of the loader's order of samples, and of attention dropout.
        memory: how the model saves memory (``engine.memory.Memory``, or some of its attributes as a dictionary); by
            default it is left as it is.
        stock: other arguments of ``deepspeed.initialize``.

    Raises:
        EngineError: the configuration contradicts the mesh, the ranks were given different things (settings, seed,
            layout, model, versions of the code or of packages), or the probe found gradients beyond repair.
        ModelError: the model uses something that a sharded sequence would get wrong.
    """
    mesh = (Mesh() if mesh is None else mesh).connect()
    watch(mesh)
    control_group(mesh)
    given = getattr(args, "deepspeed_config", None) if config is None else config
    facts: dict[str, str] = {}
    problem: Exception | None = None
    try:
        settings, layout = _prepare(model, given, mesh, layout, memory, stock)
        rows = len(training_data) if hasattr(training_data, "__len__") else None
        facts = describe(model, settings, layout.name, seed, optimizer=optimizer, memory=memory, training_rows=rows)
    except Exception as error:  # the other ranks wait in the comparison: they must hear of it
        problem = error
    compare_ranks(facts, mesh, problem)
    factor = gradient_factor(settings, mesh, mesh)

    import deepspeed

    stock = {key: value for key, value in stock.items() if value is not None}
    if args is not None and config is not None:
        stock["args"] = args
    with own_group(settings, mesh):
        engine, optimizer, _, scheduler = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            lr_scheduler=lr_scheduler,
            config=settings,
            mpu=mesh,
            **stock,
        )
    mend_reads(engine)
    engine = Engine.adopt(engine, mesh, layout, factor, seed)
    loader = None
    if training_data is not None:
        loader = RowLoader(training_data, engine, collate_fn=collate_fn, seed=seed)
    return engine, optimizer, loader, scheduler


def _prepare(
    model: Any, config: Any, mesh: Mesh, layout: str | Layout, memory: Any, stock: dict[str, Any]
) -> tuple[Settings, Layout]:
    """Check what this rank was given, and attach the model's attention. No communication."""
    for name in ("mpu", "mesh_param"):
        if stock.get(name) is not None:
            raise EngineError(f"initialize({name}=…): the mesh is DeepSpeed's mpu here; pass mesh=longctx.Mesh(…) only")
    if model is None:
        raise EngineError("initialize needs a model")
    layout = get_layout(layout)
    settings = load_settings(config, mesh)
    require_supported(settings)
    announce_clipping(settings, mesh)
    attach_attention(model, mesh, layout)
    save_memory(model, read_memory(memory), announce=mesh.rank == 0)
    check_model(model, settings)
    if mesh.device.type == "cpu":
        load_extension()  # else DeepSpeed does, and waits for ever for a lock that a killed build left
    return settings, layout


def announce_clipping(settings: Settings, mesh: Mesh) -> None:
    """Say once that DeepSpeed clips gradients where its configuration is silent about it."""
    if settings.get("gradient_clipping") is None and mesh.rank == 0:
        logger.warning(
            "gradient_clipping is not set: DeepSpeed clips the gradient's norm at its default of %g. Write "
            '"gradient_clipping": 0.0 into its configuration to train without, or the value you want.',
            default_clipping(),
        )


def default_clipping() -> float:
    """Return the norm at which DeepSpeed clips gradients when its configuration does not say."""
    from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

    return float(GRADIENT_CLIPPING_DEFAULT)


def attach_attention(model: Any, mesh: Mesh, layout: Layout) -> None:
    """Have the attention of transformers models run over ``mesh``, wrapped ones too; leave other modules alone."""
    parts = model.modules() if isinstance(model, torch.nn.Module) else (model,)
    if any(hasattr(getattr(part, "config", None), "_attn_implementation") for part in parts):
        from longctx.engine.step.rowcheck import watch_rows
        from longctx.models.attach import attach_attention as attach

        attach(model, mesh, layout.name)
        watch_rows(model, mesh)

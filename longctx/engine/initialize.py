"""longctx.initialize: DeepSpeed's initialize for a model whose sequences are sharded over ranks."""

from __future__ import annotations

import logging
from typing import Any

import torch

from longctx.engine.activations import ActivationSettings, apply_settings, read_settings
from longctx.engine.cpu_extension import load_extension
from longctx.engine.description import describe
from longctx.engine.engine import Engine
from longctx.engine.exchange import control_group
from longctx.engine.global_mpu import only_mpu
from longctx.engine.gradient_probe import gradient_factor
from longctx.engine.heartbeat import start_heartbeat
from longctx.engine.loader import RowLoader
from longctx.engine.settings import Settings, load_settings
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
    memory: ActivationSettings | dict[str, Any] | None = None,
    args: Any = None,
    **stock: Any,
) -> tuple[Engine, Any, RowLoader | None, Any]:
    """Return ``(engine, optimizer, loader, scheduler)``, as ``deepspeed.initialize`` does. Collective over the world.

    Args:
        model: any torch module; in a transformers model attention is replaced by ring attention over ``mesh``.
        config: DeepSpeed's configuration (a dictionary or a JSON file), which is not modified; batch sizes count rows
            per data replica. ``args.deepspeed_config`` is used if it is None.
        mesh: the grid of ranks, which is also DeepSpeed's mpu; None is a mesh of data replicas only.
        layout: how rows are sharded over the ring: zigzag, striped or contiguous.
        training_data: a map-style dataset of rows; ``loader`` then yields sharded, weighted windows.
        collate_fn: turns a list of ``training_data``'s items into a batch of full rows.
        seed: of the sample order of the loader, and of attention dropout.
        memory: how the model saves activation memory (``engine.activations.ActivationSettings``, or some of its
            attributes as a dictionary); by default the model is left unchanged.
        stock: further arguments of ``deepspeed.initialize``.

    Raises:
        EngineError: the configuration contradicts the mesh; settings, seed, layout, model, code or package versions
            differ between ranks; or the probe found gradients that no factor corrects.
        ModelError: the model uses a feature that computes wrong results on a sharded sequence.
    """
    mesh = (Mesh() if mesh is None else mesh).connect()
    start_heartbeat(mesh)
    control_group(mesh)
    given = getattr(args, "deepspeed_config", None) if config is None else config
    facts: dict[str, str] = {}
    problem: Exception | None = None
    try:
        settings, layout = _prepare(model, given, mesh, layout, memory, stock)
        rows = len(training_data) if hasattr(training_data, "__len__") else None
        facts = describe(model, settings, layout.name, seed, optimizer=optimizer, memory=memory, training_rows=rows)
    except Exception as error:  # the other ranks wait in compare_ranks, so raise there
        problem = error
    compare_ranks(facts, problem)
    factor = gradient_factor(settings, mesh, mesh)

    import deepspeed

    stock = {key: value for key, value in stock.items() if value is not None}
    if args is not None and config is not None:
        stock["args"] = args
    with own_group(settings), only_mpu(mesh):
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
    """Check this rank's arguments, and attach the model's attention. No communication."""
    for name in ("mpu", "mesh_param"):
        if stock.get(name) is not None:
            raise EngineError(f"initialize({name}=…): the mesh is DeepSpeed's mpu here; pass mesh=longctx.Mesh(…) only")
    if model is None:
        raise EngineError("initialize needs a model")
    layout = get_layout(layout)
    settings = load_settings(config, mesh)
    require_supported(settings)
    announce_clipping(settings, mesh)
    attach_transformers_model(model, mesh, layout)
    apply_settings(model, read_settings(memory), announce=mesh.rank == 0)
    check_model(model, settings)
    if mesh.device.type == "cpu":
        load_extension()  # first, because DeepSpeed waits forever for the lock of a killed build
    return settings, layout


def announce_clipping(settings: Settings, mesh: Mesh) -> None:
    """Warn, once per job, that DeepSpeed clips gradients by default if ``gradient_clipping`` is not set."""
    if settings.get("gradient_clipping") is None and mesh.rank == 0:
        logger.warning(
            "gradient_clipping is not set: DeepSpeed clips the gradient's norm at its default of %g. Write "
            '"gradient_clipping": 0.0 into its configuration to train without, or the value you want.',
            default_clipping(),
        )


def default_clipping() -> float:
    """Return DeepSpeed's default of ``gradient_clipping``."""
    from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

    return float(GRADIENT_CLIPPING_DEFAULT)


def attach_transformers_model(model: Any, mesh: Mesh, layout: Layout) -> None:
    """Shard the attention of transformers models, wrapped ones too, over ``mesh``; leave other modules unchanged."""
    parts = model.modules() if isinstance(model, torch.nn.Module) else (model,)
    if any(hasattr(getattr(part, "config", None), "_attn_implementation") for part in parts):
        from longctx.engine.step.rowcheck import watch_rows
        from longctx.models.attach import attach_attention

        attach_attention(model, mesh, layout.name)
        watch_rows(model, mesh)

"""longctx.build: construct a transformers model for a DeepSpeed configuration; under ZeRO-3, partitioned.

A model that is constructed first and partitioned later needs memory for all weights on every rank. Here each module is
partitioned as soon as it is constructed, and one rank reads pretrained weights tensor by tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longctx.engine.description import describe_config
from longctx.engine.exchange import exchange
from longctx.engine.save import refuse_empty
from longctx.engine.settings import Settings, load_settings
from longctx.engine.zero.fp16 import require_supported
from longctx.engine.zero.hpz import own_group
from longctx.errors import ModelError
from longctx.mesh import Mesh
from longctx.sameness import compare_ranks


def build(
    model: Any,
    mesh: Mesh | None = None,
    *,
    config: Any = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    layers: dict[Any, Any] | None = None,
    changes: dict[str, Any] | None = None,
) -> Any:
    """Return a causal language model of transformers with longctx's attention.

    Args:
        model: a transformers config (random weights), or a local folder that ``save_pretrained`` wrote.
        mesh: the grid of ranks. Collective over the world under ZeRO-3.
        config: the DeepSpeed configuration that ``longctx.initialize`` will get: its stage decides whether the model is
            partitioned, its precision the dtype. None builds whole weights.
        dtype: of the weights; None follows ``config`` (bf16, fp16, else fp32).
        seed: of the random weights, which do not depend on the number of ranks or the stage.
        layers: layers to convert to another kind of attention, as ``longctx.convert`` takes them.
        changes: values that replace those of a folder's config.json, such as ``max_position_embeddings``.

    Raises:
        EngineError: the configuration contradicts the mesh; under ZeRO-3, on every rank, models, seeds or dtypes differ
            between ranks.
        ModelError: the folder is incomplete, unsafe or of an unknown architecture.
    """
    from longctx.models.convert import convert
    from longctx.models.load import pretrained, zero3

    mesh = (Mesh() if mesh is None else mesh).connect()
    settings = load_settings({} if config is None else config, mesh)
    require_supported(settings)
    dtype = _dtype(settings) if dtype is None else dtype
    partitioned = (settings.get("zero_optimization") or {}).get("stage", 0) == 3
    if partitioned:
        import deepspeed

        deepspeed.init_distributed()  # uses the mesh's world; without it zero.Init would count one rank
    folder = isinstance(model, (str, Path))
    description: Any = None
    problem: Exception | None = None
    try:
        description = pretrained.read_config(model, changes) if folder else model
        if folder:
            pretrained.weight_files(model)
        if layers:
            description = convert(description, layers)
    except Exception as error:  # under ZeRO-3 the other ranks wait in compare_ranks, so raise there
        problem = error
    if partitioned:
        compare_ranks({**describe_config(description), "seed": seed, "dtype": str(dtype)}, problem)
    elif problem is not None:
        raise problem
    with own_group(settings), zero3.partitioned_by(settings) if partitioned else contextlib.nullcontext():
        if folder:
            with _agreed(mesh, partitioned), seeded(seed):  # draws the weights that only converted layers have
                built = pretrained.load_pretrained(model, dtype=dtype, config=description)
        else:
            built = pretrained.make_model(description, dtype=dtype)
    if not folder:
        with seeded(seed):  # drawn again here, so that they do not depend on what the constructor drew
            zero3.draw_weights(built, partitioned)
    if partitioned:
        zero3.allow_resizing(built, settings)
        refuse_empty(built)
    return built


@contextlib.contextmanager
def _agreed(mesh: Mesh, together: bool) -> Iterator[None]:
    """Raise on all ranks if the block fails on any: under ZeRO-3 one rank reads the weights for all.

    Args:
        together: the block is collective; False leaves an error to the rank that has it.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # the other ranks wait in the exchange, so report it there
        if not together:
            raise
        problem = error
    failed = [rank for rank, (bad,) in enumerate(exchange([int(problem is not None)], mesh)) if bad] if together else []
    if problem is not None:
        raise problem
    if failed:
        raise ModelError(f"longctx.build: ranks {failed} could not read the model; see those ranks' logs")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator within the block, and restore its state afterwards."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _dtype(settings: Settings) -> torch.dtype:
    for key, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
        if (settings.get(key) or {}).get("enabled"):
            return dtype
    return torch.float32

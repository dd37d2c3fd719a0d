"""longctx.build: a transformers model for a DeepSpeed configuration, partitioned from the start under ZeRO-3.

A model built the ordinary way exists whole on every rank before ZeRO-3 takes it apart. Here each module's weights are
partitioned as soon as it is constructed, and pretrained weights are read one tensor at a time by one rank.
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
        config: the run's own DeepSpeed configuration, the one for ``longctx.initialize``: its stage decides how the
            model is built, its dtype what it is built in. None builds it whole.
        dtype: of the weights; None follows ``config`` (bf16, fp16, else fp32).
        seed: of the random weights, the same on any number of ranks and any stage.
        layers: how chosen layers attend instead of as they did, as ``longctx.convert`` takes it.
        changes: keys of a folder's config.json that get another value, such as ``max_position_embeddings``.

    Raises:
        EngineError: the configuration contradicts the mesh; under ZeRO-3, on every rank, the ranks were given different
            models, seeds or dtypes.
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

        deepspeed.init_distributed()  # adopts the mesh's; zero.Init would count one rank without it
    folder = isinstance(model, (str, Path))
    description: Any = None
    problem: Exception | None = None
    try:
        description = pretrained.read_config(model, changes) if folder else model
        if folder:
            pretrained.weight_files(model)
        if layers:
            description = convert(description, layers)
    except Exception as error:  # under ZeRO-3 the other ranks wait in the comparison: they must hear of it
        problem = error
    if partitioned:
        compare_ranks({**describe_config(description), "seed": seed, "dtype": str(dtype)}, mesh, problem)
    elif problem is not None:
        raise problem
    with own_group(settings, mesh), zero3.partitioned_by(settings) if partitioned else contextlib.nullcontext():
        if folder:
            with _agreed(mesh, partitioned), seeded(seed):  # weights that only the converted layers have
                built = pretrained.load_pretrained(model, dtype=dtype, config=description)
        else:
            built = pretrained.make_model(description, dtype=dtype)
    if not folder:
        with seeded(seed):  # whatever constructing it has drawn
            zero3.draw_weights(built, partitioned)
    if partitioned:
        zero3.allow_resizing(built, settings)
        refuse_empty(built)
    return built


@contextlib.contextmanager
def _agreed(mesh: Mesh, together: bool) -> Iterator[None]:
    """Raise on all ranks what any rank raises within: under ZeRO-3 one rank reads the weights, and the others would go
    on with what they have.

    Args:
        together: all ranks are here; else each is for itself.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the other ranks must hear of it
        if not together:
            raise
        problem = error
    failed = [rank for rank, (bad,) in enumerate(exchange([int(problem is not None)], mesh)) if bad] if together else []
    if problem is not None:
        raise problem
    if failed:
        raise ModelError(f"longctx.build: ranks {failed} could not read the model; their own messages say why")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the CPU generator seeded with ``seed``, and put its state back afterwards."""
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

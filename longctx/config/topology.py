"""Ranks per host and heads of a configuration, and the Ulysses limits and hpZ groups that follow from them."""

from __future__ import annotations

import os
from functools import reduce
from math import gcd

from longctx.config.schema import RunConfig
from longctx.config.ulysses import UlyssesLimits
from longctx.errors import ModelError
from longctx.models.load.settings import read_settings, text_settings, whole_number
from longctx.nn.kinds import ABC, Cosine, read_layers

_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_SIZE")
_ANY = 10**6  # stands for a number of layers that is unknown before the model is loaded


def ulysses_limits(config: RunConfig, world: int) -> UlyssesLimits:
    """Return the limits of `mesh.ulysses: auto` in a world of ``world`` ranks."""
    queries, keys = heads(config)
    return UlyssesLimits(None if has_bounded_layers(config) else keys, ranks_per_host(config, world), queries)


def has_bounded_layers(config: RunConfig) -> bool:
    """Whether a layer has a bounded state: such layers pass it along a ring and do not support Ulysses."""
    try:
        kinds = read_layers(config.attention.layers, config.model.layers or _ANY) if config.attention.layers else {}
    except ModelError:
        return False  # `layer_rules` reports what is wrong
    return any(isinstance(kind, ABC | Cosine) for kind in kinds)


def heads(config: RunConfig) -> tuple[int | None, int | None]:
    """Return (query heads, key/value heads), each None if unknown before the model is loaded."""
    model = config.model
    if model.pretrained is None:
        return model.heads, model.kv_heads or model.heads
    try:
        settings = text_settings(read_settings(model.pretrained))
    except ModelError:
        return None, None  # `machine.inspect` reports what is wrong with the folder
    queries = whole_number(settings, "num_attention_heads", "n_head", "n_heads", "num_heads")
    return queries, whole_number(settings, "num_key_value_heads", "num_kv_heads") or queries


def weights_group(config: RunConfig, world: int, per_host: int | None = None) -> int | None:
    """Return the size of the groups that shard ZeRO-3's secondary copy of the weights (hpZ); None: no such copy.

    Args:
        per_host: ranks per host; None: see ``ranks_per_host``.
    """
    group = config.zero.group
    if group == "none":
        return None
    if group != "auto":
        return group
    host = per_host or ranks_per_host(config, world)
    whole = host is not None and 1 < host < world and world % host == 0
    return host if whole and config.zero.stage == 3 else None


def ranks_per_host(config: RunConfig, world: int) -> int | None:
    """Return the ranks per host, their greatest common divisor if hosts differ; None if neither the configuration nor
    the launcher of this process tells."""
    launch = config.launch
    if launch.launcher == "local":
        found = next((os.environ[name] for name in _LOCAL_SIZES if name in os.environ), "")
        return int(found) if found.isdecimal() and int(found) else world
    own = None if launch.ranks_per_host == "auto" else launch.ranks_per_host
    slots = [int(slots) if (slots := host.partition(":")[2]).isdecimal() else own for host in launch.hosts]
    if not slots:
        return own
    return None if None in slots else reduce(gcd, (number for number in slots if number))

"""Rules between keys, checked before any process starts. Each rule is a few lines; all that are broken are reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from longctx.config import architecture
from longctx.config.deepspeed import conflicts, to_deepspeed
from longctx.config.derived import derive
from longctx.config.fields import changed, environment_ok
from longctx.config.keys import leaves
from longctx.config.launch_rules import broken_launch
from longctx.config.layer_rules import broken_layers
from longctx.config.model_rules import broken_model
from longctx.config.problems import redact, show
from longctx.config.schema import RunConfig
from longctx.config.topology import has_bounded_layers, ulysses_limits
from longctx.config.topology import heads as query_heads
from longctx.engine.settings import load_settings, parts_of
from longctx.errors import ConfigError, LongctxError
from longctx.mesh import Mesh


class Finding(NamedTuple):
    """A broken rule: the key to change, what is wrong and what to write, and a code."""

    key: str
    message: str
    code: str


def broken(config: RunConfig, world: int) -> list[Finding]:
    """Return every rule that ``config`` breaks in a world of ``world`` ranks."""
    findings = [finding for rule in _RULES for finding in rule(config)]
    return findings + list(_sizes(config, world, bool(findings)))


def _model(config: RunConfig) -> Iterator[Finding]:
    for key, message, code in broken_model(config.model):
        yield Finding(key, message, code)


def _attention(config: RunConfig) -> Iterator[Finding]:
    model, attention, length = config.model, config.attention, config.data.sequence_length
    if attention.window is None:
        return
    if model.pretrained is not None:
        message = "the pretrained folder decides the window; remove the key"
        yield Finding("attention.window", message, "window")
    elif model.architecture is not None and model.architecture not in architecture.WINDOWED:
        able = ", ".join(sorted(architecture.WINDOWED))
        yield Finding(
            "attention.window", f"{model.architecture} has no sliding window; architectures with one: {able}", "window"
        )
    elif attention.window >= length:
        message = f"got {attention.window}, not below sequence_length {length}; remove the key for full attention"
        yield Finding("attention.window", message, "window")


def _layers(config: RunConfig) -> Iterator[Finding]:
    for key, message in broken_layers(config):
        yield Finding(key, message, "layers")


def _mesh(config: RunConfig) -> Iterator[Finding]:
    ulysses, (heads, _) = config.mesh.ulysses, query_heads(config)
    if ulysses == "auto" or ulysses == 1:
        return
    if heads is not None and ulysses > heads:
        message = f"got {ulysses}, above the model's {heads} heads; use at most {heads}, and mesh.ring for other ranks"
        yield Finding("mesh.ulysses", message, "heads")
    if has_bounded_layers(config):
        message = (
            f"got {ulysses}, but the bounded memories of attention.layers pass their state along a ring only; use 1 "
            "and a larger mesh.ring"
        )
        yield Finding("mesh.ulysses", message, "layers")


def _addresses(config: RunConfig) -> Iterator[Finding]:
    """Paths that are addresses of other machines, which may hold keys."""
    for leaf in leaves().values():
        value: Any = config
        for part in leaf.path:
            value = getattr(value, part)
        if environment_ok(leaf.field) and isinstance(value, str) and "://" in value:
            message = f"got {redact(value)!r}; nothing is downloaded: give a path of this machine"
            yield Finding(leaf.key, message, "url")


def _data(config: RunConfig) -> Iterator[Finding]:
    data, model = config.data, config.model
    for source in data.sources:
        if "://" in source:
            message = f"got {redact(source)!r}; nothing is downloaded: give a file, a folder or python-stdlib"
            yield Finding("data.sources", message, "url")
        elif not source.strip():
            yield Finding("data.sources", "got an empty name; give a file, a folder or python-stdlib", "empty-name")
    if model.pretrained is None and data.foreign_tokenizer:
        yield Finding("data.foreign_tokenizer", "means nothing without model.pretrained; remove the key", "idle-key")
    elif model.pretrained is not None and data.tokenizer == "bpe" and not data.foreign_tokenizer:
        message = (
            "got 'bpe', which makes new ids, but model.pretrained was trained with those of its own tokenizer; remove "
            "the key to use that one, or set data.foreign_tokenizer: true to train its embedding for other ids"
        )
        yield Finding("data.tokenizer", message, "tokenizer")
    if data.tokenizer != "bpe":
        for name in sorted({"vocab_size", "sample_bytes"} & changed(data)):
            message = f"is only for tokenizer: bpe, but tokenizer is {show(data.tokenizer)}; remove one of them"
            yield Finding(f"data.{name}", message, "idle-key")
    size = architecture.vocabulary_size(config)
    if size and model.vocab_size is not None and model.vocab_size < size:
        message = f"got {model.vocab_size}, below the tokenizer's {size} tokens; use at least {size}, or remove the key"
        yield Finding("model.vocab_size", message, "vocabulary")
    if model.max_positions is not None and model.max_positions < data.sequence_length:
        message = (
            f"got {model.max_positions}, below data.sequence_length {data.sequence_length}; raise it or remove the key"
        )
        yield Finding("model.max_positions", message, "length")
    if data.held_out == 0 and config.train.eval_every > 0:
        message = (
            f"got {config.train.eval_every}, but data.held_out is 0, so there is nothing to evaluate on; change one"
        )
        yield Finding("train.eval_every", message, "idle-key")


def _train(config: RunConfig) -> Iterator[Finding]:
    train = config.train
    given = changed(train)
    for beta in train.betas:
        if not 0 <= beta < 1:
            yield Finding("train.betas", f"got {show(train.betas)}; each is at least 0 and below 1", "out-of-range")
            break
    if train.warmup_steps > train.steps:
        message = f"got {train.warmup_steps}, more than train.steps {train.steps}; lower it"
        yield Finding("train.warmup_steps", message, "schedule")
    idle = {"adamw": {"momentum"}, "sgd": {"betas", "eps"}}[train.optimizer]
    for name in sorted(idle & given):
        yield Finding(f"train.{name}", f"means nothing for optimizer {train.optimizer}; remove the key", "idle-key")
    if train.schedule == "constant" and "min_lr_ratio" in given:
        yield Finding("train.min_lr_ratio", "means nothing for schedule constant; remove the key", "idle-key")


def _memory(config: RunConfig) -> Iterator[Finding]:
    memory = config.memory
    if memory.z_loss and memory.loss_tile == "none":
        message = "needs a tiled loss; set memory.loss_tile to auto, or remove the key"
        yield Finding("memory.z_loss", message, "conflict")
    if "loss_backend" in memory.model_fields_set and memory.loss_tile == "none":
        yield Finding("memory.loss_backend", "means nothing without a tiled loss; remove the key", "idle-key")
    if memory.offload_checkpoints and memory.recompute in ("none", "mlp"):
        message = f"there are no checkpoints with memory.recompute {memory.recompute}; choose layer_keep_attention"
        yield Finding("memory.offload_checkpoints", message, "conflict")


def _fp16(config: RunConfig) -> Iterator[Finding]:
    fp16 = config.fp16
    given = changed(fp16)
    if config.model.dtype != "fp16":
        for name in sorted(given):
            message = f"means nothing for model.dtype {config.model.dtype}; remove the key, or use fp16"
            yield Finding(f"fp16.{name}", message, "idle-key")
        return
    if fp16.static_scale is not None:
        for name in sorted(given - {"static_scale"}):
            yield Finding(f"fp16.{name}", "means nothing beside fp16.static_scale; remove one of them", "idle-key")
    elif fp16.min_scale > 2**fp16.scale_power:
        message = f"got {fp16.min_scale}, above the first scale, 2 to the power {fp16.scale_power}; lower it"
        yield Finding("fp16.min_scale", message, "out-of-range")
    if config.zero.stage == 0 and "hysteresis" in given:
        message = "means nothing at zero.stage 0, which lowers the scale at each overflow; remove the key"
        yield Finding("fp16.hysteresis", message, "zero-stage")


def _zero(config: RunConfig) -> Iterator[Finding]:
    zero = config.zero
    yield from _nvme(config)
    if zero.offload_parameters != "none" and zero.stage != 3:
        message = f"got 'cpu', but stage {zero.stage} does not shard parameters; use zero.stage 3"
        yield Finding("zero.offload_parameters", message, "zero-stage")
    if isinstance(zero.group, int) and zero.stage != 3:
        message = (
            f"got {zero.group}, but stage {zero.stage} does not shard weights; use zero.stage 3, or remove the key"
        )
        yield Finding("zero.group", message, "zero-stage")
    if zero.stage == 0:
        if zero.offload_optimizer == "cpu":
            message = "got 'cpu', but stage 0 shards no optimizer state to offload; use zero.stage 1, 2 or 3"
            yield Finding("zero.offload_optimizer", message, "zero-stage")
        for name in ("overlap_comm", "reduce_scatter", "contiguous_gradients"):
            if name in changed(zero):
                yield Finding(
                    f"zero.{name}", "means nothing at zero.stage 0; remove the key, or use 1, 2 or 3", "zero-stage"
                )


def _nvme(config: RunConfig) -> Iterator[Finding]:
    zero = config.zero
    if zero.offload_optimizer != "nvme":
        if zero.nvme_folder is not None:
            message = "means nothing without zero.offload_optimizer: nvme; remove the key"
            yield Finding("zero.nvme_folder", message, "idle-key")
        return
    if zero.nvme_folder is None:
        message = "is missing; zero.offload_optimizer: nvme needs a folder on every host's NVMe disk"
        yield Finding("zero.nvme_folder", message, "missing")
    if zero.stage != 3:
        message = f"got 'nvme', which DeepSpeed reads as cpu at stage {zero.stage}; use zero.stage 3, or cpu"
        yield Finding("zero.offload_optimizer", message, "zero-stage")
    if config.train.optimizer != "adamw":
        message = (
            f"got 'nvme', which is shown to train the same model with adamw only, not {config.train.optimizer}; use cpu"
        )
        yield Finding("zero.offload_optimizer", message, "conflict")


def _deepspeed(config: RunConfig) -> Iterator[Finding]:
    for key, message in conflicts(config):
        yield Finding(f"deepspeed.{key}", message, "conflict")


def _launch(config: RunConfig) -> Iterator[Finding]:
    for key, message, code in broken_launch(config.launch, config.checkpoint.resume):
        yield Finding(f"launch.{key}", message, code)


_RULES: tuple[Callable[[RunConfig], Iterator[Finding]], ...] = (
    _model,
    _attention,
    _layers,
    _mesh,
    _addresses,
    _data,
    _train,
    _memory,
    _fp16,
    _zero,
    _deepspeed,
    _launch,
)


def _sizes(config: RunConfig, world: int, others: bool) -> Iterator[Finding]:
    """Rules that need the world: the grid, the batch, the length, and DeepSpeed's own view of them."""
    mesh, length, layout = config.mesh, config.data.sequence_length, config.attention.layout
    if mesh.world not in ("auto", world):
        yield Finding("mesh.world", f"got {mesh.world}, but the launcher started {world} ranks; remove the key", "mesh")
        return
    group = config.zero.group
    if isinstance(group, int) and (group >= world or world % group):
        yield Finding("zero.group", f"got {group}; {parts_of(world)}", "zero-group")
    try:
        grid = mesh.sizes(world, ulysses_limits(config, world))
    except ConfigError as error:
        key = next((name for name in ("ring", "data", "world", "ulysses") if name in mesh.model_fields_set), "ring")
        yield Finding(f"mesh.{key}", str(error).removeprefix("mesh: "), "mesh")
        return
    least = grid.ring * grid.ulysses * (2 if layout == "zigzag" else 1)
    if length < least:
        message = f"got {length}; ring {grid.ring} with layout {layout} needs at least {least} tokens a row"
        yield Finding("data.sequence_length", message, "length")
        return
    try:
        derived = derive(config, world)
    except ConfigError as error:
        yield Finding("train.global_batch", str(error).removeprefix("global_batch "), "batch")
        return
    if config.deepspeed and not others:
        try:
            load_settings(
                to_deepspeed(config, derived), Mesh(grid.ring, grid.ulysses, grid.data, world_size=world, rank=0)
            )
        except LongctxError as error:
            yield Finding("deepspeed", str(error), "deepspeed")

"""Set up a run on all ranks: token files, loaders, model, engine, checkpoint to resume."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longctx.collectives import broadcast_json, gather_json, ranks, together
from longctx.config.deepspeed import to_deepspeed
from longctx.config.derived import Derived, derive
from longctx.config.schema import RunConfig
from longctx.config.write import dump
from longctx.data.loader import EvaluationLoader, ShardedLoader
from longctx.engine.engine import Engine
from longctx.engine.initialize import initialize
from longctx.engine.zero.fp16 import require_supported
from longctx.errors import ConfigError, DataError
from longctx.mesh import Mesh
from longctx.models.hook.binding import binding_of
from longctx.sameness import compare_ranks, flatten
from longctx.train import folder
from longctx.train.checkpoint.checkpointer import Checkpoints, Progress
from longctx.train.checkpoint.export import PretrainedFiles, read_source
from longctx.train.checkpoint.manifest import Manifest
from longctx.train.checkpoint.same_run import settings_of
from longctx.train.corpus import Corpus, Say, prepare_corpus
from longctx.train.environment import git_commit, versions
from longctx.train.model import build_model, hash_of_model, memory_of, model_config
from longctx.train.optimizer import make_optimizer


@dataclass
class Job:
    """Everything one rank needs to train."""

    config: RunConfig
    sizes: Derived
    mesh: Mesh
    output: Path
    corpus: Corpus
    loader: ShardedLoader
    held_out: EvaluationLoader | None
    engine: Engine
    checkpoints: Checkpoints
    start: Progress
    parameters: int
    description: Any  # the transformers config
    source: PretrainedFiles | None  # which an export copies; None for a model from scratch


def find_checkpoint(config: RunConfig, sizes: Derived, say: Say) -> tuple[Checkpoints, Manifest | None]:
    """Return the run's checkpoints and the one to resume, if any, before data or model are built. All ranks call it.

    Raises:
        CheckpointError: on every rank, if there is nothing valid to resume, or its settings are incompatible with this
            run's.
    """
    output = Path(config.output.folder).absolute()
    facts = _facts(config, sizes)
    checkpoints = Checkpoints(output / folder.CHECKPOINTS, config.checkpoint.keep, facts, say)
    notice = broadcast_json(folder.lost(output) if ranks()[0] == 0 else None)
    if notice:
        say(notice)
    return checkpoints, checkpoints.find(config.checkpoint.resume)


def set_up(
    config: RunConfig, mesh: Mesh, sizes: Derived, say: Say, checkpoints: Checkpoints, found: Manifest | None
) -> Job:
    """Return a job, ready for its first step or restored from ``found``. All ranks call it.

    Args:
        checkpoints, found: returned by ``find_checkpoint``.

    Raises:
        LongctxError: on every rank, if data, model, engine or checkpoint cannot be set up on any.
    """
    agree_on_group(sizes)
    with together():
        require_supported(to_deepspeed(config, sizes))
    output = Path(config.output.folder).absolute()
    corpus = _prepare(config, say)
    with together():
        loader, held_out = _loaders(config, sizes, mesh, corpus)
        config = _within_data(config, loader, say)
        description = model_config(config, corpus.vocabulary_size, corpus.end_of_document, corpus.beginning)
        source = read_source(config.model.pretrained)
    say(
        f"mesh: {sizes.world} ranks = data {sizes.data} x ring {sizes.ring} x ulysses {sizes.ulysses}; rows of "
        f"{config.data.sequence_length:,} tokens, {sizes.local_length:,} on each rank"
    )
    content = {"model": hash_of_model(config, description), "data": loader.identity}
    compare_ranks({"data": content["data"], **flatten(description.to_dict(), "model")})
    checkpoints.facts = replace(checkpoints.facts, run=checkpoints.facts.run | content)
    if found is not None:
        checkpoints.require_content(found)
    engine = _engine(config, sizes, mesh, description)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    start = Progress()
    if found is not None:
        start = checkpoints.load(engine, found)
        loader.seek(start.samples)
        say(f"resumed at step {start.step} of {config.train.steps} from {checkpoints.root}")
    kind = config.model.architecture or config.model.pretrained
    say(f"model: {kind}, {parameters:,} parameters, {config.model.dtype}, ZeRO-{config.zero.stage}")
    return Job(
        config, sizes, mesh, output, corpus, loader, held_out, engine, checkpoints, start, parameters, description,
        source,
    )  # fmt: skip


def agree_on_group(sizes: Derived) -> None:
    """Check that `zero.group: auto` resolved to the same size on all ranks; under torchrun each host uses its own size.

    Raises:
        ConfigError: on every rank, if it did not.
    """
    found = gather_json(sizes.group)
    if any(group != found[0] for group in found):
        raise ConfigError(f"zero.group: auto is {found} on the ranks, whose hosts differ in size; set a number or none")


def sizes_of(config: RunConfig) -> Derived:
    """Return the run's sizes for the number of ranks that were actually started."""
    return derive(config, ranks()[1] if torch.distributed.is_initialized() else None)


def _prepare(config: RunConfig, say: Say) -> Corpus:
    """Have rank 0 build the token files while the others wait, and send them the paths."""
    corpus = None
    with together():
        if ranks()[0] == 0:
            corpus = prepare_corpus(config, say)
    return Corpus(**broadcast_json(asdict(corpus) if corpus else None))


def _loaders(
    config: RunConfig, sizes: Derived, mesh: Mesh, corpus: Corpus
) -> tuple[ShardedLoader, EvaluationLoader | None]:
    data = config.data
    common: dict[str, Any] = {
        "tokenizer_hash": corpus.tokenizer_hash,
        "vocabulary_size": config.model.vocab_size or corpus.vocabulary_size,
        "micro_batch": sizes.micro_batch,
        "mesh": mesh,
        "layout": config.attention.layout,
        "packing": data.packing,
    }
    loader = ShardedLoader(
        corpus.train,
        data.sequence_length,
        accumulation=sizes.accumulation,
        seed=data.seed,
        weights=data.weights or None,
        repeat=data.exhausted == "repeat",
        **common,
    )
    if corpus.held_out is None:
        return loader, None
    held_out = EvaluationLoader(
        corpus.held_out, data.sequence_length, max_rows=config.train.eval_batches * sizes.data, **common
    )
    return loader, held_out


def _within_data(config: RunConfig, loader: ShardedLoader, say: Say) -> RunConfig:
    """Return the configuration with the number of steps that the data is enough for; report the shares of sources.

    Raises:
        DataError: it is not enough for one step.
    """
    windows, steps = loader.windows_in_all, config.train.steps
    if windows == 0:
        raise DataError(
            f"data.exhausted: stop: a step reads {loader.samples_per_window:,} rows, but a source is exhausted before "
            "that; give more text, a smaller train.global_batch, or data.exhausted: repeat"
        )
    if windows is not None and windows < steps:
        say(f"data: exhausted after {windows:,} of {steps:,} steps, where the run ends (data.exhausted: stop)")
        steps = windows
    samples = steps * loader.samples_per_window
    for source in loader.mixture(samples):
        share = f"{source['samples']:,} rows ({source['samples'] / samples:.1%} of the run)"
        say(f"data: {share} of {source['source']}, {source['epochs']:.2f} epochs of its {source['rows']:,}")
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def _engine(config: RunConfig, sizes: Derived, mesh: Mesh, description: Any) -> Engine:
    """Build the model (identical on all ranks) and its engine, and seed each rank's random stream for dropout."""
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    settings = to_deepspeed(config, sizes)
    model = build_model(config, description, settings, mesh)
    optimizer = make_optimizer(model, config.train)
    engine, *_ = initialize(
        model=model,
        config=settings,
        mesh=mesh,
        layout=config.attention.layout,
        optimizer=optimizer,
        seed=config.train.seed,
        memory=memory_of(config),
    )
    binding = binding_of(engine.module)
    assert binding is not None  # initialize attached the model
    binding.backend = config.attention.backend
    torch.manual_seed(config.train.seed * 1_000_003 + 1 + mesh.rank)
    return engine


def _facts(config: RunConfig, sizes: Derived) -> Manifest:
    """Return the facts that every manifest of this run records, without the hashes of model and data."""
    return Manifest(
        step=0,
        samples=0,
        tokens=0,
        seed=config.data.seed,
        world={"size": sizes.world, "data": sizes.data, "ring": sizes.ring, "ulysses": sizes.ulysses},
        layout=config.attention.layout,
        zero_stage=config.zero.stage,
        config_sha256=hashlib.sha256(dump(config).encode()).hexdigest(),
        git_commit=git_commit(),
        versions=versions(),
        run={
            "settings": settings_of(config),
            "optimizer": config.train.optimizer,
            "dtype": config.model.dtype,
            "threads": torch.get_num_threads(),
            "global_batch": sizes.global_batch,
        },
    )

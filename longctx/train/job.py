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
from longctx.config.stages import model_of
from longctx.config.write import dump
from longctx.data.loader import EvaluationLoader, ShardedLoader
from longctx.data.progress import Stages
from longctx.engine.engine import Engine
from longctx.engine.initialize import initialize
from longctx.engine.zero.fp16 import require_supported
from longctx.errors import ConfigError
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
from longctx.train.model import build_model, hash_of_model, memory_of
from longctx.train.optimizer import make_optimizer
from longctx.train.stage import TrainingStage, begin_stage, training_stages, within_data


@dataclass
class Job:
    """Everything one rank needs to train."""

    config: RunConfig
    sizes: Derived
    mesh: Mesh
    output: Path
    corpus: Corpus
    stages: tuple[TrainingStage, ...]
    stage: TrainingStage  # the current one
    engine: Engine
    checkpoints: Checkpoints
    start: Progress
    parameters: int
    description: Any  # the transformers config
    source: PretrainedFiles | None  # which an export copies; None for a model from scratch

    @property
    def loader(self) -> ShardedLoader:
        """The training data of the current stage."""
        return self.stage.loader

    @property
    def held_out(self) -> EvaluationLoader | None:
        """The evaluation data of the current stage, if any."""
        return self.stage.held_out

    def begin(self, stage: TrainingStage, say: Say) -> None:
        """Make ``stage`` the current one: engine, model and data. All ranks call it, between two optimizer steps."""
        self.stage.loader.close()
        self.stage = stage
        begin_stage(self.engine, stage, say)
        self.checkpoints.facts = _of_stage(self.checkpoints.facts, stage)

    def close(self) -> None:
        """Stop the threads that read ahead."""
        for stage in self.stages:
            stage.loader.close()


def stage_of(stages: tuple[TrainingStage, ...], step: int) -> TrainingStage:
    """Return the stage of an optimizer step (from 1); the last one for later steps."""
    return next((stage for stage in stages if step <= stage.last), stages[-1])


def _of_stage(facts: Manifest, stage: TrainingStage) -> Manifest:
    return replace(facts, run=facts.run | {"data": stage.loader.identity})


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
        with Stages(say, "assigning documents to rows"):
            stages = training_stages(config, sizes.world, mesh, corpus)
        stages = within_data(config, stages, say)
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": stages[-1].last})})
        source = read_source(config.model.pretrained)
    say(
        f"mesh: {sizes.world} ranks = data {sizes.data} x ring {sizes.ring} x ulysses {sizes.ulysses}; rows of "
        f"{config.data.sequence_length:,} tokens, {sizes.local_length:,} on each rank"
    )
    facts = {f"data of stage {one.number + 1}": one.loader.identity for one in stages}
    compare_ranks({**facts, **flatten(stages[-1].description.to_dict(), "model")})
    known = checkpoints.facts.run | {"model": hash_of_model(config, stages[-1].description)}
    done = 0 if found is None else found.step
    checkpoints.facts = _of_stage(replace(checkpoints.facts, run=known), stage_of(stages, max(done, 1)))
    if found is not None:
        checkpoints.require_content(found)
    stage = stage_of(stages, done + 1)
    checkpoints.facts = _of_stage(checkpoints.facts, stage)
    engine = _engine(config, stage, mesh)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    start = Progress()
    if found is not None:
        start = checkpoints.load(engine, found)
        if start.step + 1 == stage.first:
            start = replace(start, stage_begin=start.samples)
        stage.loader.seek(start.samples - start.stage_begin)
        say(f"resumed at step {start.step} of {config.train.steps} from {checkpoints.root}")
    kind = config.model.architecture or config.model.pretrained
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)
    part = "" if trained == parameters else f" ({trained:,} trained)"
    say(f"model: {kind}, {parameters:,} parameters{part}, {config.model.dtype}, ZeRO-{config.zero.stage}")
    if len(stages) > 1:
        say(str(stage))
    return Job(
        config, sizes, mesh, output, corpus, stages, stage, engine, checkpoints, start, parameters,
        stages[-1].description, source,
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


def _engine(config: RunConfig, stage: TrainingStage, mesh: Mesh) -> Engine:
    """Build the model (identical on all ranks) and its engine, and seed each rank's random stream for dropout."""
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    settings = to_deepspeed(stage.config, stage.sizes)
    model = build_model(model_of(config, stage), stage.description, settings, mesh)
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

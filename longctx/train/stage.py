"""The stages of a run on one rank: the loaders of each, and what changes in the engine when one begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from longctx.config.derived import Derived, derive
from longctx.config.schema import RunConfig
from longctx.config.stages import RunStage, model_of, ropes, stages_of, whole
from longctx.data.loader import EvaluationLoader, ShardedLoader
from longctx.engine.engine import Engine
from longctx.errors import DataError
from longctx.mesh import Mesh
from longctx.models.hook.rope import change_rope
from longctx.train.corpus import Corpus
from longctx.train.model import model_config


@dataclass(frozen=True)
class TrainingStage:
    """Steps ``first`` to ``last`` of a run, on rows of one length."""

    number: int  # from 0
    first: int
    last: int
    config: RunConfig  # the run as if this were its only stage
    sizes: Derived
    loader: ShardedLoader
    held_out: EvaluationLoader | None
    description: Any  # the transformers config of the model, with the RoPE of this stage

    def __str__(self) -> str:
        rows = f"rows of {self.config.data.sequence_length:,} tokens, {self.sizes.local_length:,} on each rank"
        return f"stage {self.number + 1}: steps {self.first:,} to {self.last:,}, {self.sizes.global_batch} {rows}"


def training_stages(config: RunConfig, world: int, mesh: Mesh, corpus: Corpus) -> tuple[TrainingStage, ...]:
    """Return the stages of a run, each with loaders of its own at their first sample. No communication.

    Raises:
        DataError: the token files do not fit the model or the rows.
        ModelError: transformers rejects the model.
    """
    final = describe(whole(config), corpus)
    found = []
    for stage in stages_of(config):
        sizes = derive(stage.config, world)
        description = describe(model_of(config, stage), corpus) if ropes(config) else final
        found.append(TrainingStage(*stage, sizes, *_loaders(stage, sizes, mesh, corpus), description))
    return tuple(found)


def describe(config: RunConfig, corpus: Corpus) -> Any:
    """Return the transformers config of a run's model."""
    return model_config(config, corpus.vocabulary_size, corpus.end_of_document, corpus.beginning)


def begin_stage(engine: Engine, stage: TrainingStage, say: Callable[[str], None]) -> None:
    """Set the engine's batch sizes and the model's RoPE for a stage, between two optimizer steps. All ranks call it."""
    engine.set_train_micro_batch_size(stage.sizes.micro_batch)
    engine.set_train_batch_size(stage.sizes.global_batch)
    change_rope(engine.module, stage.description)
    say(str(stage))


def within_data(
    config: RunConfig, stages: tuple[TrainingStage, ...], say: Callable[[str], None]
) -> tuple[TrainingStage, ...]:
    """Return the stages, a single one with as many steps as the data is enough for; report the shares of sources.

    Raises:
        DataError: it is not enough for one step, or for a stage.
    """
    found = []
    for stage in stages:
        loader, steps = stage.loader, stage.last - stage.first + 1
        windows = loader.windows_in_all
        if windows == 0:
            raise DataError(
                f"data.exhausted: stop: a step reads {loader.samples_per_window:,} rows, but a source is exhausted "
                "before that; give more text, a smaller train.global_batch, or data.exhausted: repeat"
            )
        if windows is not None and windows < steps and len(stages) > 1:
            raise DataError(
                f"data.exhausted: stop: a source is exhausted after {windows:,} of the {steps:,} steps of "
                f"train.stages[{stage.number}]; lower its steps, give more text, or data.exhausted: repeat"
            )
        if windows is not None and windows < steps:
            say(f"data: exhausted after {windows:,} of {steps:,} steps, where the run ends (data.exhausted: stop)")
            steps = windows
        samples = steps * loader.samples_per_window
        where = "the run" if len(stages) == 1 else f"stage {stage.number + 1}"
        for source in loader.mixture(samples):
            share = f"{source['samples']:,} rows ({source['samples'] / samples:.1%} of {where})"
            say(f"data: {share} of {source['source']}, {source['epochs']:.2f} epochs of its {source['rows']:,}")
        found.append(replace(stage, last=stage.first + steps - 1))
    return tuple(found)


def _loaders(
    stage: RunStage, sizes: Derived, mesh: Mesh, corpus: Corpus
) -> tuple[ShardedLoader, EvaluationLoader | None]:
    config, data = stage.config, stage.config.data
    common: dict[str, Any] = {
        "tokenizer_hash": corpus.tokenizer_hash,
        "vocabulary_size": config.model.vocab_size or corpus.vocabulary_size,
        "micro_batch": sizes.micro_batch,
        "mesh": mesh,
        "layout": config.attention.layout,
        "packing": data.packing,
        "long_documents": data.long_documents,
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

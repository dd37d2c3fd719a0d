"""Run a training job on one rank: lock the output folder, set up, train, then write model, plot, sample, summary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from longctx.collectives import ranks, together
from longctx.config.schema import RunConfig
from longctx.config.write import dump
from longctx.engine.heartbeat import start_heartbeat
from longctx.errors import CheckpointError, MissingPackageError
from longctx.mesh import Mesh
from longctx.train import durable, folder
from longctx.train.checkpoint import store
from longctx.train.checkpoint.card import model_card
from longctx.train.checkpoint.export import export_model
from longctx.train.checkpoint.manifest import Progress
from longctx.train.checkpoint.swap import swap_folder
from longctx.train.environment import environment, git_commit
from longctx.train.job import Job, find_checkpoint, set_up, sizes_of
from longctx.train.lock import FolderLock
from longctx.train.loop import Loop, LoopResult
from longctx.train.report import metrics
from longctx.train.report.metrics import Metrics
from longctx.train.report.plot import plot_loss
from longctx.train.report.progress import ProgressDisplay, duration
from longctx.train.report.sample import Sample, draw_sample
from longctx.train.same_start import compare_start
from longctx.train.signals import PREEMPTED, StopFlag


def run(
    config: RunConfig,
    console: TextIO | None = None,
    columns: int = 0,
    stop: StopFlag | None = None,
    give_up: Callable[[str], None] | None = None,
) -> int:
    """Train ``config`` on this rank.

    Args:
        config: the same on every rank.
        console: rank 0's output stream for the user; None prints nothing.
        columns: width of the terminal behind ``console``, if that is on another host; else 0.
        stop: catches signals already; None installs the handlers here.
        give_up: exits this process with a message when another rank is frozen; None writes the message to stderr and
            exits with code 1.

    Returns:
        0 after the last step, 75 when stopped by a signal after saving a checkpoint.

    Raises:
        LongctxError: on every rank, if anything fails on any.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        stop = stack.enter_context(StopFlag()) if stop is None else stop
        compare_start(config)  # first: with other settings a rank would call other collectives
        mesh = _connect(config)
        heartbeat = start_heartbeat(mesh, config.launch.frozen_seconds, give_up)
        if heartbeat is not None:
            stack.callback(heartbeat.stop)
        output = Path(config.output.folder).absolute()
        stack.enter_context(_folder(output))  # from here on no other run can write to it
        display = ProgressDisplay(
            console if mesh.rank == 0 else None, config.train.steps, config.train.log_every, columns
        )
        stack.callback(display.close)
        sizes = sizes_of(config)
        # Before data and model are built, which takes minutes; and before anything is written, because a rejected
        # resume leaves the folder unchanged.
        checkpoints, found = find_checkpoint(config, sizes, display.say)
        _describe(config, mesh, output)
        stack.enter_context(swap_folder(config))
        job = set_up(config, mesh, sizes, display.say, checkpoints, found)
        display.total = job.config.train.steps  # fewer if the data is exhausted before
        stack.callback(job.close)
        stack.callback(job.engine.destroy)
        writer = _metrics(job, display.say)
        if writer is not None:
            stack.callback(writer.close)
        stop.training()  # until here a signal ended the process; now it stops the loop after a step
        outcome = Loop(job, stop, display, writer).run()
        display.close()
        summary = _summary(job, outcome, time.monotonic() - started)
        if outcome.stopped:
            _write(output, summary | {"status": "stopped"})
            display.say(
                f"stopped on request after step {outcome.progress.step}; start again to resume, or "
                f"`longctx export {job.config.output.folder}` writes its model"
            )
            return PREEMPTED
        _finish(
            job, outcome.progress, summary, display
        )  # before the engine is destroyed: the export gathers its weights
    return 0


def _connect(config: RunConfig) -> Mesh:
    sizes = sizes_of(config)
    return Mesh(sizes.ring, sizes.ulysses, sizes.data).connect()


@contextmanager
def _folder(output: Path) -> Iterator[None]:
    """Lock the run directory for the duration of the run; all ranks raise if another run holds it."""
    lock = FolderLock(output)
    with ExitStack() as stack:
        with together():
            if ranks()[0] == 0:
                stack.enter_context(lock)
                folder.require_usable(output)
                store.clean(output / folder.CHECKPOINTS)
        yield


def _describe(config: RunConfig, mesh: Mesh, output: Path) -> None:
    """Write config.yaml and environment.json, once it is certain that this run may use the folder."""
    with together():
        if mesh.rank == 0:
            world = {"size": mesh.world_size, "data": mesh.data_size, "ring": mesh.ring_size}
            facts = environment({**world, "ulysses": mesh.ulysses_size}, git_commit())
            try:
                durable.write_atomically(output / "config.yaml", dump(config))
                durable.write_json(output / "environment.json", facts)
                if folder.saved_step(output) is None:
                    folder.note_saved(output, 0)
            except OSError as error:
                raise CheckpointError(f"{output} cannot be written: {error.strerror}") from None


def _metrics(job: Job, say: Callable[[str], None]) -> Metrics | None:
    writer = None
    with together():
        if job.mesh.rank == 0:
            writer = Metrics(job.output, job.start.step, job.config.output.tensorboard, say)
    return writer


def _summary(job: Job, outcome: LoopResult, wall: float) -> dict[str, Any]:
    records = metrics.read(job.output) if job.mesh.rank == 0 else []
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    held_out = metrics.held_out(records)
    return {
        "status": "completed",
        "step": outcome.progress.step,
        "steps": job.config.train.steps,
        "started_at_step": job.start.step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "first_held_out_loss": held_out[0][1] if held_out else None,
        "last_held_out_loss": held_out[-1][1] if held_out else None,
        "held_out_losses": [{"step": step, "loss": loss} for step, loss in held_out],
        "tokens": outcome.progress.tokens,
        "samples": outcome.progress.samples,
        "epochs": _epochs(job, outcome.progress),
        "tokens_per_second": outcome.tokens / outcome.step_seconds if outcome.step_seconds else None,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "seconds": wall,
        "seconds_in_loop": outcome.seconds,
        "share_of_time_training": outcome.step_seconds / wall,
        "parameters": job.parameters,
        "world": {"size": job.sizes.world, "data": job.sizes.data, "ring": job.sizes.ring},
        "sequence_length": job.config.data.sequence_length,
        "data": job.corpus.report,
        "mixture": job.loader.mixture(outcome.progress.samples),
        "checkpoint": str(job.checkpoints.root / store.name_of(outcome.progress.step)),
    }


def _epochs(job: Job, progress: Progress) -> float:
    """Return how often the data was trained on: by rows, or with several lengths of rows by tokens."""
    rows = job.loader.rows
    return progress.samples / len(rows) if len(job.stages) == 1 else progress.tokens / rows.token_count


def _finish(job: Job, progress: Progress, summary: dict[str, Any], display: ProgressDisplay) -> None:
    """Write the results: the model as a transformers folder, loss.png, a sample, summary.json."""
    card = model_card(job.config, job.stage.description, progress)
    model = export_model(job.engine, Path(job.corpus.tokenizer), job.output, job.source, job.config, card)
    sample = None
    with together():  # the other ranks wait for rank 0, so that they fail too if it does
        if job.mesh.rank == 0:
            sample = _sample(job, model, display)
            results = {"model": str(model), "plot": _plot(job, display)}
            summary |= results | {"sample": None if sample is None else vars(sample)}
            _write(job.output, summary)
    if sample is not None:
        display.say(f"\na held-out document, {sample.document}:\n{sample.prompt}")
        display.say(f"--- and the model's continuation:\n{sample.continuation}\n---")
    if job.mesh.rank == 0:
        _report(summary, display)


def _sample(job: Job, model: Path, display: ProgressDisplay) -> Sample | None:
    """Return a continuation of a held-out document by the exported model, if one is asked for and possible."""
    settings = job.config.output
    if (lora := job.config.model.lora) is not None and lora.export == "adapter":
        display.say(f"no sample: {model} holds an adapter; PeftModel.from_pretrained loads it")
        return None
    if not job.corpus.held_out or not settings.sample_tokens:
        return None
    try:
        return draw_sample(model, Path(job.corpus.held_out), settings.sample_prompt, settings.sample_tokens)
    except ValueError as error:  # transformers rejects the folder's generation config; the model is saved
        display.say(f"no sample: {error}")
        return None


def _plot(job: Job, display: ProgressDisplay) -> str | None:
    if not job.config.output.plot:
        return None
    try:
        return str(plot_loss(job.output))
    except MissingPackageError as error:
        display.say(f"no loss.png: {error}")
        return None


def _report(summary: dict[str, Any], display: ProgressDisplay) -> None:
    first, last = summary["first_held_out_loss"], summary["last_held_out_loss"]
    if last is not None:
        display.say(f"held-out loss {first:.3f} -> {last:.3f}" if first != last else f"held-out loss {last:.3f}")
    speed = f" at {summary['tokens_per_second']:,.0f} tokens/s" if summary["tokens_per_second"] else ""
    display.say(f"{summary['step']} steps, {summary['tokens']:,} tokens{speed}, {duration(summary['seconds'])} in all")
    for key in ("plot", "checkpoint", "model"):
        if summary[key]:
            display.say(f"{key}: {summary[key]}")


def _write(output: Path, summary: dict[str, Any]) -> None:
    if ranks()[0] == 0:
        try:
            durable.write_json(output / "summary.json", json.loads(json.dumps(summary)))
        except OSError as error:
            raise CheckpointError(f"{output / 'summary.json'} cannot be written: {error.strerror}") from None

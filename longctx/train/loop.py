"""The training loop: optimizer steps with evaluation, checkpoints, metrics, and a stop on request.

All ranks run it in lockstep. Values that differ between ranks (signals received, token counts, memory) are gathered
once per step in one small collective.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from longctx.collectives import gather_floats
from longctx.engine.zero.fp16 import loss_scale
from longctx.errors import NonFiniteError
from longctx.train.checkpoint.checkpointer import Progress
from longctx.train.job import Job, stage_of
from longctx.train.optimizer import learning_rate, set_learning_rate
from longctx.train.report.flops import FlopsModel, peak_flops
from longctx.train.report.metrics import Metrics
from longctx.train.report.progress import ProgressDisplay
from longctx.train.signals import StopFlag


@dataclass
class LoopResult:
    """How the loop ended."""

    progress: Progress
    stopped: bool = False  # on request, before the last step
    seconds: float = 0.0  # wall time of the whole loop
    step_seconds: float = 0.0  # wall time of the training steps only
    tokens: int = 0  # trained on since this start
    peak_memory_bytes: int = 0


class _Gathered(NamedTuple):
    """What the ranks tell each other after a step."""

    stopped: bool  # a signal reached any of them
    tokens: int  # their sum
    pairs: int  # their sum
    peak_memory_bytes: int  # the largest
    data_seconds: float  # the longest wait for data


class Loop:
    """Runs a job from its first step, or the resumed one, to its last.

    Args:
        job: returned by ``set_up``.
        stop: set by a signal on this rank.
        display: rank 0's progress line; silent on other ranks.
        metrics: writes metrics.jsonl on rank 0; None on other ranks.
    """

    def __init__(self, job: Job, stop: StopFlag, display: ProgressDisplay, metrics: Metrics | None) -> None:
        self.job, self.stop, self.display, self.metrics = job, stop, display, metrics
        self.flops = FlopsModel(job.description, job.parameters)
        peak = peak_flops(job.mesh.device, job.config.model.dtype)
        self.peak = None if peak is None else peak * job.mesh.world_size
        self.outcome = LoopResult(job.start)

    def run(self) -> LoopResult:
        """Train until the last step or a request to stop; evaluate and save as configured.

        Raises:
            NonFiniteError: on every rank, before the update, if a loss or gradient is not finite on any.
            CheckpointError: on every rank, if a checkpoint cannot be written.
        """
        job, settings = self.job, self.job.config.train
        started = time.monotonic()
        at_start = self._evaluate() if job.start.step == 0 and settings.eval_every else None
        while self.outcome.progress.step < settings.steps and not self.outcome.stopped:
            self._enter_stage()
            record = self._step()
            if at_start is not None:
                record["eval_loss_at_start"], at_start = at_start, None
            step = self.outcome.progress.step
            last = step == settings.steps
            if last or (settings.eval_every and step % settings.eval_every == 0):
                loss = self._evaluate()
                if loss is not None:
                    record["eval_loss"] = loss
            if self.metrics is not None:
                self.metrics.write(record)
            self.display.step(record)
            every = job.config.checkpoint.every
            if last or self.outcome.stopped or (every and step % every == 0):
                job.checkpoints.save(job.engine, self.outcome.progress)
        self.outcome.seconds = time.monotonic() - started
        return self.outcome

    def _enter_stage(self) -> None:
        """Begin the stage of the next step, if it is another than that of the last one."""
        stage = stage_of(self.job.stages, self.outcome.progress.step + 1)
        if stage is not self.job.stage:
            self.job.begin(stage, self.display.say)
            self.outcome.progress = replace(self.outcome.progress, stage_begin=self.outcome.progress.samples)

    def _step(self) -> dict[str, Any]:
        """Run one optimizer step and return its record for metrics.jsonl."""
        job, engine, step = self.job, self.job.engine, self.outcome.progress.step + 1
        started = time.monotonic()
        window = next(job.loader)
        data_seconds = time.monotonic() - started
        rate = self._set_rate(step)
        tokens = sum(int((batch["document_ids"] >= 0).sum()) for batch in window)
        pairs = sum(self.flops.pairs(batch) for batch in window)
        self._train(window, step)
        found = self._gather(tokens, pairs, data_seconds)
        seconds = time.monotonic() - started
        self._advance(step, found.tokens, seconds, found.peak_memory_bytes, found.stopped)
        scale = loss_scale(engine)
        in_fp16 = {} if scale is None else {"loss_scale": scale, "skipped_steps": engine.skipped_steps}
        flops = self.flops.step(found.tokens, found.pairs)
        return {
            "step": step,
            "loss": engine.global_loss,
            "learning_rate": rate,
            "grad_norm": engine.grad_norm,
            "tokens": found.tokens,
            "tokens_per_second": found.tokens / seconds,
            "mfu": None if self.peak is None else flops / seconds / self.peak,
            "peak_memory_bytes": found.peak_memory_bytes,
            "step_seconds": seconds,
            "data_seconds": found.data_seconds,
            "tokens_total": self.outcome.progress.tokens,
            "samples_total": self.outcome.progress.samples,
            **in_fp16,
            **self._stage_facts(),
        }

    def _set_rate(self, step: int) -> float:
        """Set and return the learning rate of a step."""
        settings = self.job.config.train
        rate = learning_rate(
            step,
            peak=self.job.stage.config.train.lr,
            warmup=settings.warmup_steps,
            total=settings.steps,
            schedule=settings.schedule,
            final_ratio=settings.min_lr_ratio,
        )
        set_learning_rate(self.job.engine.optimizer, rate)
        return rate

    def _train(self, window: list[dict[str, Any]], step: int) -> None:
        """Run forward, backward and the update over the micro-batches of an accumulation window."""
        engine = self.job.engine
        try:
            for batch in engine.weigh(window):
                engine.backward(engine(**batch).loss)
                engine.step()
        except NonFiniteError as error:
            raise self._named(error, step) from None

    def _gather(self, tokens: int, pairs: int, data_seconds: float) -> _Gathered:
        """Return what all ranks report. A signal on any rank stops all after this step, so they save the same one."""
        mine = [float(self.stop.raised is not None), tokens, pairs, _peak_memory(self.job.mesh.device), data_seconds]
        everyone = gather_floats(mine)
        return _Gathered(
            bool(everyone[:, 0].any()),
            int(everyone[:, 1].sum()),
            int(everyone[:, 2].sum()),
            int(everyone[:, 3].max()),
            float(everyone[:, 4].max()),
        )

    def _stage_facts(self) -> dict[str, int]:
        stage = self.job.stage
        if len(self.job.stages) == 1:
            return {}
        return {"stage": stage.number + 1, "sequence_length": stage.config.data.sequence_length}

    def _advance(self, step: int, tokens: int, seconds: float, memory: int, stopped: bool) -> None:
        outcome, before = self.outcome, self.outcome.progress
        samples = before.samples + self.job.loader.samples_per_window
        outcome.progress = replace(before, step=step, samples=samples, tokens=before.tokens + tokens)
        outcome.stopped = stopped and step < self.job.config.train.steps
        outcome.step_seconds += seconds
        outcome.tokens += tokens
        outcome.peak_memory_bytes = max(outcome.peak_memory_bytes, memory)

    def _evaluate(self) -> float | None:
        """Return the loss on held-out documents; None if there are none."""
        if self.job.held_out is None:
            return None
        batches = (batch for window in self.job.held_out for batch in window)
        return self.job.engine.evaluate(batches, sharded=True).loss

    def _named(self, error: NonFiniteError, step: int) -> NonFiniteError:
        """Return the error with the step's rows added to its message, so that the user can inspect them."""
        begin = self.outcome.progress.samples
        rows = self.job.loader.row_ids(begin - self.outcome.progress.stage_begin).flatten().tolist()
        shown = ", ".join(map(str, rows[:16])) + (f", … ({len(rows)} in all)" if len(rows) > 16 else "")
        return NonFiniteError(
            f"{error}. It was step {step}, samples {begin} to {begin + len(rows) - 1}, rows {shown} of "
            f"{self.job.corpus.train}; `longctx data inspect` shows them"
        )


def _peak_memory(device: torch.device) -> int:
    """Return this rank's peak memory so far, in bytes: allocated by torch on a GPU, resident set size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""`longctx rehearse CONFIG`: run one training step as one rank of the run's world, and compare it with `plan`.

Model, DeepSpeed engine and step are the run's own; `longctx/rehearse/step.py` simulates the other ranks. Only the
checks that compare ranks with each other are skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longctx.errors import ConfigError, LaunchError
from longctx.patched import patched, patched_environ

if TYPE_CHECKING:
    from longctx.config.derived import Derived
    from longctx.config.schema import RunConfig

MOST_FLOPS = 5e12  # per step; a CPU takes a minute or two
USABLE_SHARE = 0.7  # of the free memory
_MARK = 1_234_567  # bytes; allocations of exactly this size mark the beginning and end of the third step


@dataclass(frozen=True)
class Rehearsal:
    """Bytes that one rank held and sent in one step, measured and predicted."""

    rank: int
    world: int
    peak: int
    planned_peak: int
    sent: dict[str, int]
    planned_sent: dict[str, int]


def rehearse(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file (`longctx init` writes one)")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides of the file, e.g. model.layers=1")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="the rank of the run's world to simulate")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure one rank's memory and traffic in one process.

    It runs one training step as one rank of the run's world, without the others, and prints the exact bytes held and
    sent beside those that `plan` predicts.
    """
    from longctx.config.derived import derive, world_size
    from longctx.config.load import load

    loaded = load(config, overrides or [])
    found = run(loaded, derive(loaded, world_size(loaded)), rank)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    typer.echo(f"rank {found.rank} of {found.world}, one micro-batch, on the CPU")
    typer.echo(f"  held at most  {found.peak:>16,} bytes   plan {found.planned_peak:>16,}")
    for name, value in found.sent.items():
        typer.echo(f"  {name:<12}  {value:>16,} bytes   plan {found.planned_sent[name]:>16,}")


def run(config: RunConfig, sizes: Derived, rank: int) -> Rehearsal:
    """Rehearse one micro-batch and optimizer step of a run as one of its ranks.

    Raises:
        ConfigError: there is no such rank, or this machine has too little memory or compute for it.
        LaunchError: this process is a rank of a real job.
    """
    from longctx.plan.memory import step_bytes
    from longctx.plan.setup import setup_of
    from longctx.plan.shape import shape_of
    from longctx.plan.work import flops_of, wire_of

    if config.zero.offload_optimizer == "nvme":
        raise ConfigError("rehearse: zero.offload_optimizer: nvme writes to the run's own files; rehearse it with cpu")
    shape = shape_of(config)
    setup = setup_of(config, sizes, shape, on_gpu=False)
    plan, wire = step_bytes(shape, setup).peak.total, wire_of(shape, setup)
    _require_room(plan, flops_of(shape, setup).done)
    if not rank < sizes.world:
        raise ConfigError(f"rehearse --rank {rank}: the run has {sizes.world} ranks; give 0 to {sizes.world - 1}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise LaunchError("rehearse simulates a rank, but this shell is one already; unset WORLD_SIZE and RANK")
    from longctx.rehearse.step import as_rank

    with as_rank(rank, sizes.world), _without_others():
        peak, seen = _step(config, sizes)
    sent = {
        "ring": seen.sent.kv_bytes + seen.sent.document_bytes + seen.sent.gradient_bytes,
        "heads": seen.sent.exchange_bytes,
        "states": seen.sent.state_bytes,
        "zero": sum(seen.collectives.values()),
    }
    planned = {
        "ring": wire.ring_forward + wire.ring_backward,
        "heads": wire.ulysses,
        "states": wire.states,
        "zero": wire.zero,
    }
    return Rehearsal(rank, sizes.world, peak, plan, sent, planned)


def _require_room(needed: int, flops: float) -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    less = (
        "rehearse fewer layers or a shorter sequence (model.layers=1 data.sequence_length=…); layers send equal amounts"
    )
    if needed > USABLE_SHARE * free:
        raise ConfigError(
            f"rehearse: a rank holds {needed / 2**30:,.1f} GiB, and this machine has {free / 2**30:,.1f} free; {less}"
        )
    if flops > MOST_FLOPS:
        raise ConfigError(f"rehearse: a rank's step is {flops:.1e} FLOPs, too many for a CPU; {less}")


@contextmanager
def _without_others() -> Iterator[None]:
    """Skip what needs other ranks' values: DeepSpeed's comparison of traces, and our probe of its gradient scaling."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    from longctx.engine import initialize

    with (
        patched_environ(LOCAL_RANK="0"),
        patched(coordinator, assert_ints_same_as_other_ranks=lambda ints: None),
        patched(initialize, gradient_factor=lambda *settings: 1.0),
    ):
        yield


def _step(config: RunConfig, sizes: Derived) -> tuple[int, Any]:
    """Return (peak bytes held in the third step, with model and optimizer; what that step sent).

    The third step is the first that runs from ZeRO-3's recorded module order. The first window also runs the position
    probe, forward passes without gradients, so ZeRO-3 records the order in the second step.
    """
    import torch

    from longctx.rehearse.step import CountingMode, held_bytes, watch

    found: list[Any] = []

    def three_steps() -> None:
        with CountingMode():
            engine, step = _engine(config, sizes)
            step()
            step()
        torch.empty(_MARK, dtype=torch.uint8)
        found.append(watch(step, profiled=False)[1])
        torch.empty(_MARK, dtype=torch.uint8)
        found.append(engine)

    peak = held_bytes(three_steps, _MARK)
    seen, engine = found
    engine.destroy()
    return peak, seen


def _engine(config: RunConfig, sizes: Derived) -> tuple[Any, Any]:
    """Return the run's engine as `longctx train` builds it, and a function that runs one step on random tokens."""
    import torch

    from longctx.config.deepspeed import to_deepspeed
    from longctx.engine.initialize import initialize
    from longctx.mesh import Mesh
    from longctx.plan.shape import shape_of
    from longctx.train.model import build_model, memory_of, model_config
    from longctx.train.optimizer import make_optimizer

    mesh, settings = Mesh(sizes.ring, sizes.ulysses, sizes.data), to_deepspeed(config, sizes)
    vocabulary, layout = shape_of(config).vocab, config.attention.layout
    model = build_model(config, model_config(config, vocabulary, None), settings, mesh)
    optimizer = make_optimizer(model, config.train)
    engine = initialize(model, settings, mesh, layout=layout, optimizer=optimizer, memory=memory_of(config))[0]

    def step() -> None:
        ids = torch.randint(0, vocabulary, (sizes.micro_batch, config.data.sequence_length))
        rows = [{"input_ids": ids, "labels": ids}] * sizes.accumulation
        for batch in engine.shard(rows):
            engine.backward(engine(**batch).loss)
            engine.step()

    return engine, step

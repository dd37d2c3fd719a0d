"""`longctx plan CONFIG`: predict a run's memory, time and traffic on a named machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longctx.errors import ConfigError

if TYPE_CHECKING:
    from longctx.config.schema import RunConfig
    from longctx.plan.machines import Machine
    from longctx.plan.setup import Setup
    from longctx.plan.shape import ModelShape
    from longctx.plan.stages import PlannedStage

PICTURES = (".png", ".pdf", ".svg")


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file (`longctx init` writes one)")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. mesh.ring=8")] = None,
    machine: Annotated[str, typer.Option(help="a100, h100, h200, b200, mi300x or cpu")] = "h100",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="number of nodes; default: as many as the mesh needs")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="devices per node; default: the machine's")] = None,
    memory: Annotated[float | None, typer.Option(min=0.01, help="GiB per device, instead of the machine's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    choosing: Annotated[bool, typer.Option("--choose", help="choose the fastest settings that fit, and plan these")] = (
        False
    ),
    sweep: Annotated[
        Path | None, typer.Option(help="plot sequence length over memory and devices to this file")
    ] = None,
) -> None:
    """Predict a run's memory, time and traffic.

    It also prints the longest sequence that fits, and which changes allow longer ones. Of a run with stages, each has a
    line, and the one that needs most memory is shown.
    """
    from longctx.plan.plan import as_json as plain
    from longctx.plan.plan import make_plan
    from longctx.plan.shape import shape_of
    from longctx.plan.show import show
    from longctx.plan.stages import plan_stages

    if sweep is not None:
        _require_picture(sweep)
    run, world, device = _read(config, overrides or [], machine, nodes, gpus_per_node, memory)
    planned = plan_stages(run, world, device, on_gpu=machine != "cpu")
    worst = max(planned, key=lambda stage: stage.peak)
    shape, setup = shape_of(worst.stage.config), worst.setup
    if choosing:
        setup = _chosen(shape, setup, device, quiet=as_json)
    if sweep is not None:
        from longctx.plan.sweep import draw

        typer.echo(f"drawn: {draw(shape, setup, device, sweep)}", err=True)
    made = make_plan(shape, setup, device)
    if as_json:
        typer.echo(json.dumps(plain(made) | _stages(planned), indent=1))
    else:
        for stage in planned if len(planned) > 1 else ():
            typer.echo(stage.line)
        show(made)
    raise typer.Exit(0 if made.fits else 1)


def _stages(planned: list[PlannedStage]) -> dict[str, Any]:
    """Return every stage's prediction as plain values, {} for a run of one stage."""
    if len(planned) == 1:
        return {}
    rows = [
        {
            "steps": [one.stage.first, one.stage.last],
            "tokens": one.stage.config.data.sequence_length,
            "rows": one.sizes.global_batch,
            "peak_bytes": one.peak,
            "fits": one.fits,
            "seconds": one.seconds,
        }
        for one in planned
    ]
    return {"stages": rows}


def _require_picture(path: Path) -> None:
    """Raise ConfigError for a picture that cannot be written, before computing it."""
    if path.suffix.lower() not in PICTURES:
        raise ConfigError(f"plan --sweep {path}: give a file name that ends in one of {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"plan --sweep {path}: there is no folder {path.parent}; create it, or name another file")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"plan --sweep {path}: cannot be written; name another file")


def _read(
    path: Path, overrides: list[str], name: str, nodes: int | None, per_node: int | None, memory: float | None
) -> tuple[RunConfig, int, Machine]:
    """Return the run, its ranks and the machine that the command line names."""
    from dataclasses import replace

    from longctx.config.derived import CPU_RANKS, world_size
    from longctx.config.load import load
    from longctx.plan.machines import GIB, machine_named

    device = machine_named(name)
    if per_node is not None:
        device = replace(device, per_node=per_node)
    if memory is not None:
        device = replace(device, memory=int(memory * GIB), reserved=0)
    given = None if nodes is None and per_node is None else (nodes or 1) * device.per_node
    default = given or (CPU_RANKS if name == "cpu" else device.per_node)
    config = load(path, overrides, default_world=default)
    world = world_size(config, default)
    _require_devices(config, world, given)
    return config, world, device


def _chosen(shape: ModelShape, setup: Setup, device: Machine, quiet: bool) -> Setup:
    """Return the fastest settings that fit, and print them as overrides."""
    from longctx.plan.choose import choose

    found = choose(shape, setup.tokens, device, setup.world, start=setup)
    if not quiet:
        typer.echo("chosen   " + " ".join(f"{key}={value}" for key, value in found.yaml.items()) + "\n")
    return found.setup


def _require_devices(config: RunConfig, world: int, given: int | None) -> None:
    if given is not None and world != given:
        raise ConfigError(
            f"plan: the mesh has {world} ranks, but --nodes x --gpus-per-node is {given}; change the mesh "
            "(mesh.ring=…, mesh.data=…) or the number of devices"
        )

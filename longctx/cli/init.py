"""`longctx init`: write a configuration file to start from, for a preset or for a pretrained folder and a machine."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from longctx.errors import ConfigError


def init(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="file to write; default: stdout")] = None,
    *,
    preset: Annotated[
        str | None, typer.Option(help="cpu-tiny (default), 1-gpu-32k, 8-gpu-1M, 32-gpu-8M, …: see configs/")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="write every other key too, commented out, at its default")] = (
        False
    ),
    model: Annotated[Path | None, typer.Option(help="pretrained folder to continue, instead of a preset")] = None,
    machine: Annotated[str, typer.Option(help="with --model: a100, h100, h200, b200, mi300x or cpu")] = "h100",
    gpus: Annotated[int | None, typer.Option(min=1, help="with --model: devices in all; default: one node")] = None,
    length: Annotated[
        str | None, typer.Option(help="with --model: tokens per row, e.g. 128Ki; default: the folder's positions")
    ] = None,
    data: Annotated[str, typer.Option(help="with --model: text to train on")] = "python-stdlib",
    output: Annotated[Path | None, typer.Option(help="the same as FILE")] = None,
) -> None:
    """Write a commented configuration file to start from.

    With --model it contains what fits on the machine by `longctx plan`, each key with the reason for its value.
    """
    if file is not None and output is not None:
        raise ConfigError(f"init: {file} and --output {output} both name the file; give one of them")
    if model is None:
        text = _of_preset(preset or "cpu-tiny", full)
    elif preset is not None:
        raise ConfigError(f"init: --preset {preset} and --model {model} are two starts; give one of them")
    else:
        text = _of_model(model, machine, gpus, length, data, full)
    _write(text, file or output)


def _of_preset(name: str, full: bool) -> str:
    from longctx.config.presets import PRESETS, render

    if name not in PRESETS:
        raise ConfigError(f"init --preset {name}: there is no such preset; choose one of {', '.join(PRESETS)}")
    return render(name, full=full)


def _of_model(folder: Path, machine: str, gpus: int | None, length: str | None, data: str, full: bool) -> str:
    from longctx.config.fields import human_int
    from longctx.config.write import template
    from longctx.plan.machines import machine_named
    from longctx.plan.propose import propose

    tokens = human_int(length) if length is not None else None
    if length is not None and (not isinstance(tokens, int) or tokens < 2):
        raise ConfigError(f"init --length {length}: expected a whole number of tokens, such as 131072 or 128Ki")
    device = machine_named(machine)
    devices = gpus or device.per_node
    if devices < device.per_node:
        device = replace(device, per_node=devices)
    made = propose(folder, device, devices, tokens, data)
    return template(made.values, made.title, full=full, reasons=made.reasons)


def _write(text: str, path: Path | None) -> None:
    if path is None:
        typer.echo(text, nl=False)
        return
    try:
        with path.open("x") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} already exists and is left alone; give another name") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; give another name") from None
    name = shlex.quote(str(path))
    typer.echo(f"wrote {path}; next: longctx check {name} && longctx train {name}")

"""`longctx export`: write a run's model from one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory, of a finished or a stopped run")],
    output: Annotated[Path | None, typer.Option(help="folder to write; default: RUN/model")] = None,
    step: Annotated[
        int | None, typer.Option(help="step of the checkpoint; default: the newest valid one", min=0)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default: the pretrained model's, else training's")
    ] = None,
) -> None:
    """Export a checkpoint as a transformers model folder."""
    from longctx.train.checkpoint.export_run import export_run

    typer.echo(str(export_run(run, output, step, dtype)))

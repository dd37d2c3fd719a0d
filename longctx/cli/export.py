"""`longctx export`: the model of a run, from one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, whose training may have been stopped")],
    output: Annotated[Path | None, typer.Option(help="folder to write; default: model in the run directory")] = None,
    step: Annotated[int | None, typer.Option(help="of the checkpoint; default: the newest whole one", min=0)] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: the source's, or training's")] = None,
) -> None:
    """Write a checkpoint's weights as a folder that plain transformers loads."""
    from longctx.train.checkpoint.export_run import export_run

    typer.echo(str(export_run(run, output, step, dtype)))

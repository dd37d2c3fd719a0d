"""The command line: `longctx train|launch|check|plan|rehearse|explain|schema|init|data|generate|export|plot|doctor`.

Heavy modules (torch, transformers, deepspeed) are imported inside commands, so that the others start at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longctx import __version__
from longctx.cli.explain import explain
from longctx.cli.export import export
from longctx.cli.generate import generate
from longctx.cli.init import init
from longctx.cli.plan import plan
from longctx.errors import ConfigError, LaunchError, LongctxError
from longctx.launch.early import StoppedEarly
from longctx.launch.surroundings import settle
from longctx.rehearse.world import rehearse
from longctx.train.signals import code_of, sentence_of

if TYPE_CHECKING:
    from longctx.config.derived import Derived
    from longctx.config.load import Loaded

app = typer.Typer(
    name="longctx",
    help="Train transformers on long sequences, sharded over a ring of devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Build token files from text, and inspect them.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.command()(init)
app.command()(explain)
app.command()(generate)
app.command()(export)
app.command()(plan)
app.command()(rehearse)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file (`longctx init` writes one)")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides of the file, e.g. train.steps=100")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longctx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that come before a command."""


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train on this machine, or on the hosts of the `launch` section."""
    from longctx.launch.early import stopping_early
    from longctx.launch.foresee import too_large
    from longctx.launch.start import require_own_shell, start

    with stopping_early():
        require_own_shell(config)
        loaded, derived = _checked(config, overrides or [])
        for sentence in too_large(loaded.config, derived):
            typer.echo(f"note: {sentence}", err=True)
        raise typer.Exit(start(loaded.config, derived, config, overrides or []))


@app.command()
def launch(
    config: Config,
    overrides: Overrides = None,
    print_only: Annotated[bool, typer.Option("--print", help="print commands and placement; run nothing")] = False,
    check_only: Annotated[bool, typer.Option("--check", help="check that every host is ready; do not train")] = False,
) -> None:
    """Train, or only print the commands, or check the hosts.

    Without an option it is the same as `train`.
    """
    if not (print_only or check_only):
        return train(config, overrides)
    loaded, derived = _checked(config, overrides or [], starting=False)
    if print_only:
        from longctx.cli.launch_print import show

        typer.echo(show(loaded.config, derived, config, overrides or []))
        return
    if loaded.config.launch.launcher == "local":
        raise LaunchError("launcher local has no hosts to check; `longctx doctor` checks this machine")
    from longctx.launch.cluster import run as cluster

    code = cluster.train(loaded.config, derived, only_check=True)
    if code == 0:
        typer.echo("every host is ready")
    raise typer.Exit(code)


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Report all mistakes in a configuration; start nothing."""
    from longctx.config.derived import derive
    from longctx.config.stages import stages_of

    loaded, derived = _checked(config, overrides or [], starting=False)
    run, size = loaded.config, derived
    what = run.model.architecture or run.model.pretrained
    count = f", about {size.parameters / 1e6:,.1f} M parameters" if size.parameters else ""
    typer.echo(f"{config}: no mistake found")
    typer.echo(f"  model  {what}{count}, {run.model.dtype}, ZeRO-{run.zero.stage}")
    typer.echo(f"  ranks  {size.world} = data {size.data} x ring {size.ring} x ulysses {size.ulysses}")
    typer.echo(
        f"  rows   {run.data.sequence_length:,} tokens, {size.local_length:,} on each rank ({run.attention.layout})"
    )
    batch = f"{size.global_batch} rows = {size.micro_batch} x {size.accumulation} accumulated x {size.data} replicas"
    if not run.train.stages:
        typer.echo(f"  step   {batch}, {size.tokens_per_step:,} tokens; {run.train.steps:,} steps")
    for stage in stages_of(run) if run.train.stages else ():
        own = derive(stage.config, size.world)
        rows = f"{own.global_batch} rows of {stage.config.data.sequence_length:,} tokens"
        typer.echo(f"  stage {stage.number + 1}  steps {stage.first:,} to {stage.last:,}: {rows}")


@app.command()
def schema() -> None:
    """Print the JSON schema of configuration files, for editors."""
    from longctx.config.schema import RunConfig

    typer.echo(
        json.dumps(
            RunConfig.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}, indent=1
        )
    )


@data_app.command("build")
def data_build(config: Config, overrides: Overrides = None) -> None:
    """Build token files from the text of a configuration's `data` section (`train` does so itself if needed)."""
    loaded, _ = _checked(config, overrides or [])
    from longctx.train.corpus import build_corpus

    built = build_corpus(loaded.config, lambda line: typer.echo(line, err=True))
    counts = {name: value for name, value in built.report.items() if isinstance(value, int | float)}
    typer.echo(f"{built.folder}: {'unchanged since the last build' if built.reused else 'built'}")
    typer.echo("  " + ", ".join(f"{name} {value:,}" for name, value in counts.items()))


@data_app.command("inspect")
def data_inspect(
    file: Annotated[Path, typer.Argument(help="a .tokens file, or a folder that `data build` wrote")],
    row: Annotated[int, typer.Option(help="index of the packed row to show", min=0)] = 0,
    sequence_length: Annotated[int, typer.Option(help="tokens per row", min=2)] = 8192,
    packing: Annotated[str, typer.Option(help="concat or best_fit")] = "concat",
    ring: Annotated[int, typer.Option(help="ring size over which the row is sharded", min=1)] = 2,
    layout: Annotated[str, typer.Option(help="zigzag, contiguous or striped")] = "zigzag",
) -> None:
    """Verify a token file and show one packed row: its documents, and the tokens on each rank."""
    from longctx.data.inspect import inspect

    path = file / "train.tokens" if file.is_dir() else file
    inspect(path, row, sequence_length=sequence_length, packing=packing, ring=ring, layout=layout)


@app.command()
def plot(run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory")]) -> None:
    """Plot a run's metrics.jsonl to loss.png."""
    from longctx.train.report.plot import plot_loss

    typer.echo(str(plot_loss(run)))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Check that this machine is ready to train."""
    from longctx.cli.doctor import FAIL, examine

    checks = examine()
    if as_json:
        typer.echo(json.dumps([item._asdict() for item in checks], indent=1))
    else:
        for item in checks:
            typer.secho(f"{item.status:<5}", nl=False, fg={"ok": "green", "warn": "yellow"}.get(item.status, "red"))
            typer.echo(f"{item.name:<16} {item.seen}" + (f"\n      -> {item.fix}" if item.fix else ""))
    raise typer.Exit(1 if any(item.status == FAIL for item in checks) else 0)


def _checked(config: Path, overrides: list[str], starting: bool = True) -> tuple[Loaded, Derived]:
    """Load the configuration and check it against itself and this machine; raise one error with all problems."""
    from longctx.config.derived import derive, world_size
    from longctx.config.load import load_for_machine
    from longctx.launch.cluster.hosts import default_world

    loaded, notes = load_for_machine(config, overrides, default_world=default_world, starting=starting)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    return loaded, derive(loaded.config, world_size(loaded.config, default_world(loaded.config)))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A user error prints one message to stderr and exits with 2 (configuration) or 1."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # their discovery reads every package's metadata
    try:
        settle()
        app(args=arguments)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
    except LongctxError as error:
        typer.echo(f"longctx: {error}", err=True)
        sys.exit(1)
    except StoppedEarly as stop:
        typer.echo(f"longctx: {sentence_of(stop.number)}", err=True)
        sys.exit(code_of(stop.number))
    except OSError as error:  # a missing folder, a full disk, no permission: the user can fix it
        if error.strerror is None:
            raise
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        typer.echo(f"longctx: {where}{error.strerror}; make it available, or name another file or folder", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

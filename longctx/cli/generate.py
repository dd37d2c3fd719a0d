"""`longctx generate`: continue a text in this process, or on a ring of local ranks that share the context."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from longctx.errors import ConfigError, LaunchError
from longctx.generation.request import FIGURES, Request, model_folder
from longctx.launch import hardware, local
from longctx.world import launched_by


def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="a run directory, or a model's folder")],
    prompt: Annotated[str | None, typer.Option(help="text to continue")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="a file with the text; - is standard input")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="ask for one prompt after another")] = False,
    ring: Annotated[int, typer.Option(help="ranks of this machine that share the context", min=1, max=4096)] = 1,
    attention: Annotated[str, typer.Option(help="auto, el (hidden states) or kv (keys and values)")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="stop after so many")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(help="sample among the k likeliest; 0: all")] = 50,
    top_p: Annotated[float, typer.Option(help="sample among the likeliest that make up p")] = 1.0,
    beams: Annotated[int, typer.Option(help="beam search instead of sampling")] = 1,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
) -> None:
    """Continue a text with a trained model; the text goes to stdout as it is made, tokens/s to stderr."""
    _require_own_shell()
    if sum((prompt is not None, prompt_file is not None, interactive)) != 1:
        raise ConfigError("generate: give one of --prompt, --prompt-file and --interactive")
    if prompt_file is not None:
        try:
            raw = sys.stdin.buffer.read() if str(prompt_file) == "-" else prompt_file.read_bytes()
            prompt = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"generate --prompt-file {prompt_file}: cannot be read as UTF-8 text: {error}") from None
    request = Request(
        str(model_folder(checkpoint).resolve()), prompt or "", max_new_tokens=max_new_tokens, temperature=temperature,
        top_k=top_k, top_p=top_p, beams=beams, seed=seed, attention=attention,
    )  # fmt: skip
    raise typer.Exit(_run(request, ring, interactive))


def _require_own_shell() -> None:
    """Raise LaunchError inside a job of several ranks, each of which would answer by itself."""
    variables = launched_by()
    if variables is not None:
        raise LaunchError(
            f"`longctx generate` starts its own ranks, but this shell is inside a launched job ({variables}); unset "
            "both variables, and give --ring"
        )


def _run(request: Request, ring: int, interactive: bool) -> int:
    """Write the answer to stdout and its figures to stderr; return the exit code.

    Raises:
        LaunchError: the ring does not fit this machine, or cannot be interactive.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # stderr is for the figures
    if ring == 1:
        return _here(request, interactive)
    if interactive:
        raise LaunchError("generate --interactive runs in one process: leave --ring out, or give --prompt")
    if 0 < hardware.gpus() < ring:
        raise LaunchError(f"generate --ring {ring}: this machine has {hardware.gpus()} GPUs, one rank each")
    extra = {} if hardware.gpus() else {"DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory(prefix="longctx-generate-") as folder:
        path = Path(folder) / "request.json"
        request.write(path)
        command = [sys.executable, "-m", "longctx.launch.generate_rank", str(path)]
        code = local.run(command, world=ring, logs=Path(folder) / "logs", environment=extra)
        figures = path.with_name(FIGURES)
        if figures.exists():
            print(figures.read_text(encoding="utf-8"), file=sys.stderr)
        return code


def _here(request: Request, interactive: bool) -> int:
    from longctx.generation.run import Generator
    from longctx.mesh import Mesh

    generator = Generator(Path(request.folder), Mesh(ring=1, world_size=1))
    while True:
        if interactive:
            try:
                prompt = input("> ")
            except EOFError:
                print()
                return 0
            except UnicodeDecodeError as error:
                print(f"generate: the prompt is not UTF-8 text ({error.reason})", file=sys.stderr)
                continue
            if not prompt.strip():
                continue
        try:
            if interactive:
                request = Request(**(vars(request) | {"prompt": prompt}))
            done = generator.answer(request, lambda text: print(text, end="", flush=True))
        except ConfigError as error:
            if not interactive:
                raise
            print(error, file=sys.stderr)  # about this prompt; the next may do
            continue
        print()
        print(done.summary(1), file=sys.stderr)
        if not interactive:
            return 0

"""`longctx generate`: continue a text, in this process or on a ring of local ranks that shard the context."""

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
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="run directory, or a model's folder")],
    prompt: Annotated[str | None, typer.Option(help="text to continue")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="file with the text to continue; - reads stdin")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="read prompts from the terminal")] = False,
    ring: Annotated[int, typer.Option(help="local ranks over which the context is sharded", min=1, max=4096)] = 1,
    attention: Annotated[str, typer.Option(help="what to cache: el (hidden states), kv, or auto")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="maximum number of tokens to generate")] = 200,
    temperature: Annotated[float, typer.Option(help="sampling temperature; 0: greedy")] = 0.8,
    top_k: Annotated[int, typer.Option(help="sample from the k most likely tokens; 0: from all")] = 50,
    top_p: Annotated[float, typer.Option(help="sample from the most likely tokens with total probability p")] = 1.0,
    beams: Annotated[int, typer.Option(help="number of beams; 1: sampling, no beam search")] = 1,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
) -> None:
    """Continue a text with a trained model.

    The text goes to stdout as it is generated, tokens/s to stderr.
    """
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
    """Raise LaunchError inside a job of several ranks: each would generate separately."""
    variables = launched_by()
    if variables is not None:
        raise LaunchError(
            f"`longctx generate` starts its own ranks, but this shell is inside a launched job ({variables}); unset "
            "both variables, and give --ring"
        )


def _run(request: Request, ring: int, interactive: bool) -> int:
    """Write the text to stdout and the statistics to stderr; return the exit code.

    Raises:
        LaunchError: the ring does not fit this machine, or cannot be interactive.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # keep stderr for the statistics
    if ring == 1:
        return _here(request, interactive)
    if interactive:
        raise LaunchError("generate --interactive runs in one process: omit --ring, or give --prompt")
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
    from longctx.generation.generator import Generator
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
            print(error, file=sys.stderr)  # only this prompt failed
            continue
        print()
        print(done.summary(1), file=sys.stderr)
        if not interactive:
            return 0

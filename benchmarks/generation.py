"""The EL paper's table: generate() by what is cached, at equal batch and at the largest batch that fits.

    python -m benchmarks.generation [--full] [--cap-mib 64] [--turns 3] [--shapes bart-large gpt2 gpt2-medium]

Random weights of the published shapes, 4 beams and greedy, three methods in one run and in turns: transformers' own
cache, the same with prompts and sources kept once for all beams (a stronger baseline than the paper's), and hidden
states. The tokens of all methods are compared first. Lengths are an eighth of the paper's unless ``--full`` (for a
GPU). The cap is on cache bytes, by the formulas that tests/models compares with real caches; without --cap-mib it is
what transformers' own cache takes at the equal batch. All of it takes a quarter of an hour on two quiet cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import hardware
from benchmarks.harness import MIB, ratio, turns, write_csv
from benchmarks.harness import RESULTS as FOLDER
from longctx.decode.cost import Shape, el_bytes, kv_bytes
from longctx.generation.beams import share_beams, unshare_beams
from longctx.generation.el import disable_el, enable_el

RESULTS = FOLDER / "generation.csv"
METHODS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], None]]] = {
    "transformers": (lambda model: None, lambda model: None),
    "shared beams": (share_beams, unshare_beams),
    "hidden states (EL)": (enable_el, disable_el),
}
BYTES: dict[str, Callable[[Shape], int]] = {
    "transformers": kv_bytes,
    "shared beams": lambda shape: kv_bytes(shape, shared_prompt=True),
    "hidden states (EL)": el_bytes,
}
PAPER = {  # samples/s over the same without EL, at the largest batch of each, one V100
    ("bart-large", 4): "5.0 x", ("bart-large", 1): "3.1 x", ("gpt2", 4): "1.8 x", ("gpt2", 1): "1.8 x",
    ("gpt2-medium", 4): "2.2 x", ("gpt2-medium", 1): "1.8 x",
}  # fmt: skip
SHOWN = ("model", "beams", "batch", "method", "rows", "samples_per_second", "over_transformers", "paper")
BEAMS = (4, 1)


@dataclass(frozen=True)
class Model:
    """A published model's shape."""

    name: str
    layers: int
    width: int
    heads: int
    encoder_decoder: bool
    vocabulary: int = 50_265

    def build(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Build the model with random weights, on the device."""
        import transformers as library

        torch.manual_seed(0)
        if self.encoder_decoder:
            config: Any = library.BartConfig(
                vocab_size=self.vocabulary,
                d_model=self.width, encoder_layers=self.layers, decoder_layers=self.layers,
                encoder_attention_heads=self.heads, decoder_attention_heads=self.heads,
                encoder_ffn_dim=4 * self.width, decoder_ffn_dim=4 * self.width, forced_eos_token_id=None,
            )  # fmt: skip
            model: Any = library.BartForConditionalGeneration(config)
        else:
            config = library.GPT2Config(
                vocab_size=self.vocabulary, bos_token_id=0, eos_token_id=2, n_embd=self.width, n_layer=self.layers,
                n_head=self.heads,
            )  # fmt: skip
            model = library.GPT2LMHeadModel(config)
        return model.to(device, dtype).eval()

    def shape(self, batch: int, beams: int, read: int, written: int, element_bytes: int) -> Shape:
        """Return the sizes that decide what one generation caches."""
        prompt, source = (1, read) if self.encoder_decoder else (read, 0)
        return Shape(
            layers=self.layers, heads=self.heads, key_heads=self.heads, head_dim=self.width // self.heads,
            width=self.width, batch=batch, beams=beams, prompt=prompt, generated=written - 1, source=source,
            element_bytes=element_bytes,
        )  # fmt: skip


MODELS = {
    "bart-large": Model("bart-large", 12, 1024, 16, True),
    "gpt2": Model("gpt2", 12, 768, 12, False),
    "gpt2-medium": Model("gpt2-medium", 24, 1024, 16, False),
}


def generate(model: Any, ids: torch.Tensor, beams: int, written: int) -> tuple[float, torch.Tensor]:
    """Return (seconds, tokens) of one generation of exactly ``written`` tokens."""
    _synchronize(ids.device)
    started = time.perf_counter()
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False, max_new_tokens=written,
        min_new_tokens=written, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    _synchronize(ids.device)
    return time.perf_counter() - started, tokens


def largest_batch(model: Model, method: str, beams: int, read: int, written: int, cap: int, element_bytes: int) -> int:
    """Return the most rows whose cache fits in ``cap`` bytes; 0 if one row does not."""
    return cap // BYTES[method](model.shape(1, beams, read, written, element_bytes))


def measure(
    built: Any, batches: dict[str, int], beams: int, read: int, written: int, count: int
) -> dict[str, list[float]]:
    """Return the seconds of every method at its batch, turn by turn."""
    device = next(built.parameters()).device
    seconds: dict[str, list[float]] = {method: [] for method, batch in batches.items() if batch}
    for turn, methods in turns(seconds, count + 1):  # the first warms up
        for method in methods:
            start, stop = METHODS[method]
            start(built)
            make = torch.Generator().manual_seed(turn)
            ids = torch.randint(5, built.config.vocab_size, (batches[method], read), generator=make).to(device)
            taken = generate(built, ids, beams, written)[0]
            stop(built)
            if turn:
                seconds[method].append(taken)
    return seconds


def same_tokens(built: Any, beams: int, read: int, written: int) -> dict[str, bool]:
    """Return by method whether it generates transformers' tokens."""
    ids = torch.randint(5, built.config.vocab_size, (2, read), generator=torch.Generator().manual_seed(9))
    ids = ids.to(next(built.parameters()).device)
    made = {}
    for method, (start, stop) in METHODS.items():
        start(built)
        made[method] = generate(built, ids, beams, written)[1]
        stop(built)
    return {method: torch.equal(tokens, made["transformers"]) for method, tokens in made.items()}


def rows(model: Model, beams: int, read: int, written: int, batch: int, cap: int, count: int) -> list[dict[str, Any]]:
    """Return the rows of one model and beam count: every method at equal batch and at its largest under the cap."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    built = model.build(device, dtype)
    same = same_tokens(built, beams, read, min(written, 6))
    found = []
    for kind in ("equal batch", "largest batch"):
        batches = dict.fromkeys(METHODS, batch)
        if kind == "largest batch":
            batches = {m: largest_batch(model, m, beams, read, written, cap, dtype.itemsize) for m in METHODS}
        seconds = measure(built, batches, beams, read, written, count)
        for method, rows_at_once in batches.items():
            shown, times = "does not fit", ""
            if method in seconds:
                shown = f"{rows_at_once / median(seconds[method]):.3f}"
            if method in seconds and "transformers" in seconds:
                faster = ratio(seconds["transformers"], seconds[method])
                times = f"{rows_at_once / batches['transformers'] * faster:.2f}"
            shape = model.shape(rows_at_once, beams, read, written, dtype.itemsize)
            found.append({
                "model": model.name, "beams": beams, "read": read, "written": written, "batch": kind,
                "method": method, "rows": rows_at_once, "samples_per_second": shown,
                "over_transformers": times,
                "paper": PAPER[model.name, beams] if method.startswith("hidden") and kind == "largest batch" else "",
                "cache_bytes": BYTES[method](replace(shape)), "cap_bytes": cap if kind == "largest batch" else "",
                "same_tokens": same[method], "dtype": str(dtype).removeprefix("torch."), "turns": count,
                "load": f"{hardware.load():.1f}", "commit": hardware.commit(), "hardware": hardware.describe(),
            })  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table, and append the rows to benchmarks/results/generation.csv."""
    parser = argparse.ArgumentParser(prog="benchmarks.generation", description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--full", action="store_true", help="the paper's lengths and a cap of 12 GiB")
    parser.add_argument("--cap-mib", type=int)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    read, written, batch = (1024, 140, 32) if options.full else (128, 18, 1)
    cap_mib = options.cap_mib or (12 * 1024 if options.full else None)
    element_bytes = 2 if torch.cuda.is_available() else 4
    found = []
    for name in options.shapes:
        model = MODELS[name]
        shorter = min(read, 1024 - written) if not model.encoder_decoder else read
        for beams in BEAMS:
            own = BYTES["transformers"](model.shape(batch, beams, shorter, written, element_bytes))
            cap = own if cap_mib is None else cap_mib * MIB
            made = rows(model, beams, shorter, written, batch, cap, options.turns)
            for row in made:
                line = "  ".join(f"{row[key]!s:<18}" for key in SHOWN)
                print(line, f"{row['cache_bytes'] / MIB:8.1f} MiB", flush=True)
            found += made
    write_csv(options.results, found, append=True)
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

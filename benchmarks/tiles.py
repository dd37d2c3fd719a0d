"""`python -m benchmarks.tiles`: the tiled loss and a tiled MLP alone, beside the untiled ones and DeepSpeed's.

One process and one thread, fp32, forward and backward, everyone on the same inputs and in turns; CPU seconds (medians
of ratios taken turn by turn) and exact peak bytes beyond inputs and weights. Gradients are checked before timing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import MIB, RESULTS, origin, ratio, turns, write_csv
from benchmarks.measure import measure, peak_bytes, relative_error
from benchmarks.peers.deepspeed_alst import TILE_BYTES, tile_mlp
from longctx.models.activations.mlp import tile_mlps
from longctx.nn.loss import tiled_loss

TOKENS, VOCABULARY = 4096, 32_000  # of the loss
HIDDEN, INNER, MLP_TOKENS = 512, 1792, 8192
TURNS = 5
CLOSE = 1e-5  # relative error of every gradient, against the whole computation
Call = Callable[[], list[torch.Tensor]]


def losses() -> dict[str, Call]:
    """Return calls by name: forward and backward of a loss, returning the gradients of hidden states and head."""
    hidden = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    labels = torch.randint(0, VOCABULARY, (1, TOKENS))

    def whole() -> torch.Tensor:
        return F.cross_entropy(head(hidden).float().flatten(0, 1), labels.flatten(), reduction="sum")

    def deepspeed() -> torch.Tensor:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        def of_tile(module: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(module(x).float(), y, reduction="sum")

        shards = -(-TOKENS * VOCABULARY * 4 // TILE_BYTES)
        out: torch.Tensor = TiledFusedLogitsLoss.apply(
            of_tile, head, hidden, labels, None, shards, [head.weight], "sum"
        )
        return out

    def ours() -> torch.Tensor:
        return tiled_loss(hidden, head.weight, labels)

    made = {"whole": whole, "DeepSpeed": deepspeed, "longctx": ours}
    return {name: partial(_gradients, forward, None, [hidden, head.weight]) for name, forward in made.items()}


def mlps() -> dict[str, Call]:
    """Return calls by name: forward and backward of an MLP, returning the gradients of input and weights."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=INNER))
    theirs = LlamaMLP(plain.config)
    theirs.load_state_dict(plain.state_dict())
    tile_mlp(theirs)
    x, dout = (torch.randn(1, MLP_TOKENS, HIDDEN) for _ in range(2))
    x.requires_grad_()
    weights = list(plain.parameters())
    forwards: dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]] = {
        "whole": (lambda: plain(x), [x, *weights]),
        "checkpointed": (lambda: checkpoint(plain, x, use_reentrant=False), [x, *weights]),
        "DeepSpeed": (lambda: theirs(x), [x, *theirs.parameters()]),
    }
    for tile in (512, 256, 128):
        name = f"longctx, tiles of {tile}{' (auto)' if tile == HIDDEN // 2 else ''}"
        ours = copy.deepcopy(plain)
        tile_mlps(torch.nn.ModuleList([ours]), tile)
        forwards[name] = (partial(ours, x), [x, *ours.parameters()])
    return {name: partial(_gradients, forward, dout, inputs) for name, (forward, inputs) in forwards.items()}


def _gradients(
    forward: Callable[[], torch.Tensor], dout: torch.Tensor | None, inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    for one in inputs:
        one.grad = None
    forward().backward(dout)
    made = [one.grad for one in inputs]
    for one in inputs:
        one.grad = None
    return [grad for grad in made if grad is not None]


def compare(what: str, calls: dict[str, Call]) -> list[dict[str, Any]]:
    """Check, measure and print every call."""
    truth = calls["whole"]()
    for name, call in calls.items():
        error = max(map(relative_error, call(), truth))
        if not error <= CLOSE:
            raise AssertionError(f"{what}, {name}: gradients are off by {error:.1e} (limit {CLOSE:.0e})")
    del truth
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _, names in turns(calls, TURNS):
        for name in names:
            seconds[name].append(measure(calls[name]).cpu)
    table = []
    for name, call in calls.items():
        gc.collect()
        peak = peak_bytes(call)
        times = ratio(seconds[name], seconds["whole"])
        print(f"  {what:5}{name:32}{median(seconds[name]):7.2f} CPU s  {times:5.2f} x whole  {peak / MIB:8.2f} MiB")
        table.append({
            "what": what, "contestant": name, "cpu_seconds": f"{median(seconds[name]):.3f}",
            "ratio_to_whole": f"{times:.3f}", "peak_bytes": peak,
        })  # fmt: skip
    return table


def main() -> None:
    """Measure both and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "tiles_cpu.csv")
    output = parser.parse_args().output
    torch.manual_seed(0)
    here = origin()
    print("; ".join(here.values()), flush=True)
    rows = compare("loss", losses()) + compare("MLP", mlps())
    write_csv(output, [row | here for row in rows])


if __name__ == "__main__":
    main()

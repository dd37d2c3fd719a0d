"""`python -m benchmarks.gpu.tune`: measure candidate tile shapes on this GPU and print rows for tiles.py.

Offline on purpose: what it finds is committed and compiled ahead of time, so that no job tunes while it runs. Shapes
that do not fit the chip fail to compile and are skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from benchmarks.gpu.measure import seconds_of
from longctx.attention.backends.triton import arch, geometry
from longctx.attention.band import make_rule
from longctx.attention.scores import Scores
from longctx.kernels.flash import fused, tiles
from longctx.kernels.flash.tiles import Config
from longctx.layout import Span

LENGTH, TOKENS = 16384, 16384


def candidates(width: int, described: bool) -> Iterator[Config]:
    """Shapes worth trying; a tile of more than 128 x 128 scores never fits beside its accumulators."""
    for tile, step, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)):
        if width <= 128 or (tile * step <= 8192 and stages <= 3):
            yield Config(tile, step, warps, stages, described)


def launches(width: int, name: str, kind: str, config: Config) -> Any:
    """Return the launch of one pass over causal attention with that configuration."""
    heads, device = max(1, 2048 // width), torch.device("cuda")
    dtype = torch.float32 if kind == "float" else torch.bfloat16
    q, k, v, dout = (torch.randn(TOKENS // LENGTH, heads, LENGTH, width, device=device, dtype=dtype) for _ in range(4))
    scores = Scores(width**-0.5)
    if kind == "extras":
        slopes, seeds = torch.rand(heads, device=device), torch.arange(len(q), device=device)
        scores = Scores(width**-0.5, 30.0, slopes, 0.1, seeds)
    spans = (Span(0, LENGTH),)
    step = fused.Step(
        q, k, v, geometry(spans, spans, make_rule(True, None)), None, scores, arch(device), lambda *_: config
    )
    out, lse = torch.zeros(q.shape, device=device), torch.zeros(q.shape[:3], device=device)
    if name == "forward":
        return step.forward(out, lse, True)
    rows = fused.Prepared(q, dout, lse + 10.0, lse)
    if name == "queries":
        return step.queries(rows, out, True)[0]
    return step.keys(rows, out, torch.zeros_like(out))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["half", "extras"], choices=("half", "extras", "float"))
    parser.add_argument("--tma", action="store_true", help="sm_90: read through tensor descriptors (half only)")
    chosen = parser.parse_args()
    print(f"# {torch.cuda.get_device_name()}, arch {arch(torch.device('cuda'))}, torch {torch.__version__}")
    for kind in ["half"] if chosen.tma else chosen.kinds:
        for name in tiles.PASSES:
            best = []
            for width in tiles.WIDTHS[kind]:
                timed = sorted(_timed(width, name, kind, chosen.tma))
                best.append(timed[0][1] if timed else None)
                for seconds, config in timed[:3]:
                    print(f"#   {kind} {name} {width}: {seconds * 1e3:.3f} ms {tuple(config)}")
            print(f'("{kind}", "{name}"): ({", ".join(map(str, best))}),', flush=True)


def _timed(width: int, name: str, kind: str, described: bool) -> Iterator[tuple[float, Config]]:
    for config in candidates(width, described):
        try:
            launch = launches(width, name, kind, config)
            launch.run()
            yield seconds_of(launch.run, torch.device("cuda")), config
        except Exception as error:  # too much shared memory, or a shape the compiler refuses
            print(f"#   {kind} {name} {width} {tuple(config)}: {type(error).__name__}")


if __name__ == "__main__":
    main()

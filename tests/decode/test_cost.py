"""The byte formulas, at the paper's sizes and against caches of real generations (tests/models/test_el.py)."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from benchmarks.generation import MODELS
from longctx.decode.cost import Shape, choose, el_bytes, kv_bytes

MEASURED = Path(__file__).resolve().parents[2] / "benchmarks/results/generation.csv"
BART_LARGE = Shape(
    layers=12, heads=16, key_heads=16, head_dim=64, width=1024, batch=32, beams=4, source=1024, element_bytes=2
)


def test_the_papers_six_gibibytes() -> None:
    assert kv_bytes(BART_LARGE) == 6 * 2**30
    assert el_bytes(BART_LARGE) == 2**30 // 16
    assert kv_bytes(BART_LARGE) // el_bytes(BART_LARGE) == 2 * 12 * 4


def test_a_decoder_keeps_half_and_its_prompt_once_for_all_beams() -> None:
    gpt2 = Shape(layers=12, heads=12, key_heads=12, head_dim=64, width=768, batch=8, beams=4, prompt=900)
    assert kv_bytes(gpt2) == 8 * el_bytes(gpt2)
    assert kv_bytes(gpt2, shared_prompt=True) == 2 * el_bytes(gpt2)


def test_the_choice_is_never_the_slower_one_within_the_memory() -> None:
    assert choose(BART_LARGE).method == "kv"  # arithmetic decides: EL multiplies it
    assert choose(BART_LARGE, memory=2**30).method == "el"  # the other does not fit
    assert choose(BART_LARGE, seconds_per_byte=1e-12, seconds_per_flop=1e-16).method == "el"  # bandwidth decides
    assert choose(BART_LARGE, memory=2 * 2**30).method == "kv"  # beams share their source
    assert choose(BART_LARGE, memory=2 * 2**30, shared_prompt=False).method == "el"
    few_keys = Shape(layers=2, heads=32, key_heads=4, head_dim=128, width=4096, batch=1, prompt=1000)
    assert choose(few_keys, memory=1).method == "kv"  # grouped keys are smaller than what makes them


def test_the_choice_says_why() -> None:
    assert choose(BART_LARGE).reason.startswith("keys and values take 1.5 GiB, hidden states 64.0 MiB; both fit")
    assert "only the latter fit in 100.0 MiB" in choose(BART_LARGE, memory=100 * 2**20).reason
    assert "neither fits in 1.0 MiB" in choose(BART_LARGE, memory=2**20).reason
    assert "nothing to save" in choose(replace(BART_LARGE, source=0, prompt=9, key_heads=1)).reason


def test_the_choice_agrees_with_what_was_measured() -> None:
    """Where all of them fit, the method chosen is the one that `benchmarks.generation` saw as faster."""
    speeds: dict[tuple[str, ...], dict[str, float]] = {}
    shapes: dict[tuple[str, ...], Shape] = {}
    with MEASURED.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row["batch"] == "equal batch" and row["dtype"] == "float32":
                key = tuple(row[name] for name in ("model", "beams", "read", "written", "rows", "hardware", "commit"))
                speeds.setdefault(key, {})[row["method"]] = float(row["samples_per_second"])
                sizes = (int(row[name]) for name in ("rows", "beams", "read", "written"))
                shapes[key] = MODELS[row["model"]].shape(*sizes, element_bytes=4)
    assert len(speeds) >= 6
    for key, speed in speeds.items():
        faster = "el" if speed["hidden states (EL)"] > speed["shared beams"] else "kv"
        assert choose(shapes[key]).method == faster, (key, speed)

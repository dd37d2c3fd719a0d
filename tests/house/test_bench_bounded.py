"""The benchmarks of bounded memories: contestants are right, verdicts and tables say what the numbers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.bounded import recall, speed, summary
from benchmarks.bounded.contestants import CONTESTANTS, Shape, state_bytes
from benchmarks.bounded.variants import CLAIMS, LAYERS, VARIANTS
from longctx.nn.kinds import Ring, read_layers


def test_contestants_compute_their_definitions() -> None:
    errors = speed.check(Shape(96, heads=4, kv_heads=2, head_dim=16))
    assert set(errors) == set(CONTESTANTS) and max(errors.values()) <= speed.LARGEST_ERROR
    for name in ("ABC, 64 slots", "Cottention"):
        assert state_bytes(name, Shape(128)) == state_bytes(name, Shape(4096))


def rows(growth: float, factor: float) -> list[dict[str, Any]]:
    """Rows in which bounded memories take length ** growth, and SDPA ``factor`` times the square of it."""
    made = []
    for tokens in (256, 4096, 8192, 16_384, 32_768):
        for name in CONTESTANTS:
            seconds = tokens**growth if name != speed.SOFTMAX else factor * tokens**2 / 16_384
            one = {"tokens": tokens, "contestant": name, "state_bytes": 7}
            made.append({**one, "forward_cpu_seconds": f"{seconds:.9f}", "both_cpu_seconds": f"{seconds:.9f}"})
    return made


def test_verdicts_judge() -> None:
    assert all(holds for _, holds in speed.verdicts(rows(1.0, 100.0)))
    slow = speed.verdicts(rows(1.2, 1.0))
    assert not any(holds for text, holds in slow if "grows" in text or "x SDPA" in text or "faster" in text)
    assert abs(speed.exponent([(2, 3.0), (4, 12.0), (8, 48.0)]) - 2) < 1e-9


def test_a_quick_row(tmp_path: Path) -> None:
    made = speed.run_row(Shape(64, head_dim=16), 1, 10**6)
    assert all(float(row["both_cpu_seconds"]) > 0 and row["peak_bytes"] > 0 for row in made)
    skipped = speed.run_row(Shape(64, head_dim=16), 1, 0)[0]
    assert skipped["both_cpu_seconds"] == "not measured", "nothing is put in the place of a number"
    speed._write([*made, skipped], tmp_path)
    assert (tmp_path / "bounded_cpu.png").stat().st_size > 1000


def test_tasks_ask_for_what_was_shown() -> None:
    generator = torch.Generator().manual_seed(0)
    text, asked = recall.draw("copy", 5, 3, generator)
    assert asked == 5 and torch.equal(text[:, :5], text[:, -5:]) and bool((text[:, 5] == recall.ASK).all())
    found, asked = recall.draw("passkey", 40, 8, generator)
    for row in found:
        place = int((row == recall.MARK).nonzero()[0])
        assert torch.equal(row[place + 1 : place + 1 + asked], row[-asked:])
    assert 0 <= recall.accuracy("hybrid-16", "copy", 4, 0, steps=2, batch=2) <= 1


def test_variants_and_tables(tmp_path: Path) -> None:
    kinds = {name: read_layers(layers or {"*": "ring"}, LAYERS) for name, layers in VARIANTS.items()}
    assert sum(isinstance(kind, Ring) for kind in kinds["hybrid"]) * 4 == LAYERS
    assert len(set(kinds.values())) == len(kinds), "no two variants are the same"
    results = [
        {
            "variant": name, "seed": seed, "held_out_loss": 2.0 + 0.1 * place + 0.01 * seed, "parameters": 1,
            "held_out_losses": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 3.5}], "tokens": 10, "seconds": 2.0,
            "by_position": [4.0, 3.0, 2.0, 1.0],
        }
        for place, name in enumerate(VARIANTS)
        for seed in (0, 1, 2)
    ]  # fmt: skip
    summary.report(results, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "| softmax | 3 | 2.0100 | 0.0100 | 0.500 | 4.0000 | 1.0000 | 5 |" in text
    assert all(what in text for _, _, what in CLAIMS)
    order = list(VARIANTS)
    expected = 0.1 * (order.index("abc-mlp-32") - order.index("abc-random-32"))
    assert f"random at 32 slots | {expected:+.4f} | 0.0000 | {3 if expected < 0 else 0} of 3" in text
    assert (tmp_path / "comparison.png").stat().st_size > 1000

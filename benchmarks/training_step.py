"""The training-step row: one optimizer step of a small Llama under ZeRO-3, longctx's engine beside DeepSpeed's Ulysses.

Both engines run in the same ranks, start from the same weights and see the same rows in the same order. They take turns
step by step, and their losses must agree before any speed is reported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Verdict, add_turn, at_least, largest_peak, ratio, turns
from benchmarks.peers import NotMeasured, deepspeed_ulysses_engine, installed
from benchmarks.ranks import run_ranks
from benchmarks.registry import StepRow

OURS, THEIRS = "longctx engine", deepspeed_ulysses_engine.NAME
LOSS_LIMIT = 1e-5  # relative difference of the losses, step by step, fp32
WARM_UP = 2

Step = Callable[[dict[str, torch.Tensor]], float]


def measure_row(row: StepRow) -> dict[str, Any]:
    """Run the row on newly started ranks."""
    return next(run_ranks(row.ranks, worker, row))


def worker(rank: int, ranks: int, row: StepRow) -> Iterator[dict[str, Any]]:
    """Time both engines in turns; rank 0 yields the row's result."""
    engines: dict[str, Step] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, load in ((OURS, load_ours), (THEIRS, load_theirs)):
        results[name] = {"contestant": name, "note": "", "version": ""}
        try:
            results[name]["version"], engines[name] = load(row)
        except NotMeasured as error:
            results[name]["note"] = str(error)
    for name, figures in take_turns(engines, row, WARM_UP).items():
        results[name] |= figures
    if THEIRS in engines:
        (results[THEIRS]["loss_difference"],) = loss_differences({OURS: results[OURS], THEIRS: results[THEIRS]}, OURS)
    parameters = sum(parameter.numel() for parameter in make_model(row).parameters())
    missing: dict[str, Any] = {"cpu": [], "wall": [], "blocked": [], "loss": []}
    yield {"row": asdict(row), "parameters": parameters, "results": [missing | found for found in results.values()]}


def take_turns(engines: Mapping[str, Step], row: StepRow, warm_up: int) -> dict[str, dict[str, Any]]:
    """Return every engine's timed steps (cpu, wall, blocked, loss), and the peak bytes of one more step."""
    results: dict[str, dict[str, Any]] = {name: {"cpu": [], "wall": [], "blocked": [], "loss": []} for name in engines}
    generator = torch.Generator().manual_seed(7)
    for turn, names in turns(engines, warm_up + row.steps):
        rows = make_rows(row, generator)
        for name in names:
            gc.collect()
            losses = results[name]["loss"]
            untimed: dict[str, list[float]] = {"cpu": [], "wall": [], "blocked": []}
            add_turn(
                lambda losses=losses, step=engines[name], rows=rows: losses.append(step(rows)),  # type: ignore[misc]
                untimed if turn < warm_up else results[name],
            )
    rows = make_rows(row, generator)
    for name, step in engines.items():
        gc.collect()
        results[name]["peak"] = largest_peak(partial(step, rows))
    return results


def loss_differences(results: Mapping[str, dict[str, Any]], ours: str) -> list[float]:
    """Return the largest relative difference of each engine's losses to `ours`, which is left out.

    Raises:
        AssertionError: a difference exceeds LOSS_LIMIT.
    """
    found = []
    for name, result in results.items():
        if name != ours:
            pairs = zip(result["loss"], results[ours]["loss"], strict=True)
            found.append(max(abs(a - b) / abs(b) for a, b in pairs))
            if not found[-1] <= LOSS_LIMIT:
                both = f"{result['loss']} {results[ours]['loss']}"
                raise AssertionError(f"{name}: losses differ by {found[-1]:.1e} (limit {LOSS_LIMIT:.0e}): {both}")
    return found


def make_model(row: StepRow, attention: str = "sdpa") -> torch.nn.Module:
    """Build the same small Llama for everyone, from one seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=row.vocabulary,
        hidden_size=row.hidden,
        intermediate_size=row.intermediate,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        num_key_value_heads=row.kv_heads,
        max_position_embeddings=row.length,
        attn_implementation=attention,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, eps=1e-6)


def make_config() -> dict[str, Any]:
    """Return a new DeepSpeed configuration: ZeRO-3, fp32, clipping."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def make_rows(row: StepRow, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return one sequence, the same on every rank; its first third has no labels."""
    ids = torch.randint(row.vocabulary, (1, row.length), generator=generator)
    labels = ids.clone()
    labels[:, : row.length // 3] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(row.length)[None]}


def load_ours(row: StepRow, memory: dict[str, Any] | None = None) -> tuple[str, Step]:
    """Return longctx's version and step, as in a user's own loop."""
    import longctx

    model = make_model(row)
    engine, *_ = longctx.initialize(
        model=model, optimizer=make_optimizer(model), config=make_config(), mesh=longctx.Mesh(ring=row.ranks),
        memory=memory,
    )  # fmt: skip

    def step(rows: dict[str, torch.Tensor]) -> float:
        batch = engine.shard(rows)
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return engine.global_loss

    return longctx.__version__, step


def load_theirs(row: StepRow) -> tuple[str, Step]:
    """Return DeepSpeed's version and step, if the pinned version is installed."""
    peer = deepspeed_ulysses_engine
    version = installed(peer.PACKAGE, peer.PINNED)
    model = make_model(row)
    return version, peer.load(model, make_optimizer(model), make_config())


def speed(ours: dict[str, Any], theirs: dict[str, Any], key: str) -> float:
    """Return ours ÷ theirs in tokens per second."""
    return ratio(theirs[key], ours[key])


def verdicts(measured: dict[str, Any]) -> list[Verdict]:
    """Require at least as many tokens per second as DeepSpeed's engine, in CPU time and on the wall."""
    ours, theirs = measured["results"]
    titles = {"cpu": "tokens per CPU second", "wall": "tokens per second"} if theirs["cpu"] else {}
    return [
        at_least(f"training step: {title} ÷ {THEIRS}", speed(ours, theirs, key), 1.0) for key, title in titles.items()
    ]

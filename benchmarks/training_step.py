"""The training-step row: one optimizer step of a small Llama under ZeRO-3, longctx's engine beside DeepSpeed's Ulysses.

Both engines live in the same ranks, start from the same weights and see the same rows in the same order; they take
turns step by step, and their losses must agree before any speed is reported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import measure, peak_bytes
from benchmarks.peers import NotMeasured, deepspeed_ulysses_engine, installed
from benchmarks.ranks import run_ranks
from benchmarks.registry import StepRow

OURS, THEIRS = "longctx engine", deepspeed_ulysses_engine.NAME
LOSS_LIMIT = 1e-5  # relative difference of the losses, step by step, fp32
WARM_UP = 2

Step = Callable[[dict[str, torch.Tensor]], float]


def measure_row(row: StepRow) -> dict[str, Any]:
    """Run the row on fresh ranks."""
    return next(run_ranks(row.ranks, worker, row))


def worker(rank: int, ranks: int, row: StepRow) -> Iterator[dict[str, Any]]:
    """Both engines in turns; what rank 0 yields is the row's result."""
    engines: dict[str, Step] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, load in ((OURS, load_ours), (THEIRS, load_theirs)):
        empty: dict[str, Any] = {"cpu": [], "wall": [], "blocked": [], "loss": []}
        results[name] = {"contestant": name, "note": "", "version": "", **empty}
        try:
            results[name]["version"], engines[name] = load(row)
        except NotMeasured as error:
            results[name]["note"] = str(error)
    generator = torch.Generator().manual_seed(7)
    for number in range(WARM_UP + row.steps):
        rows = make_rows(row, generator)
        names = list(engines) if number % 2 == 0 else list(engines)[::-1]
        for name in names:
            turn(engines[name], rows, results[name], timed=number >= WARM_UP)
    rows = make_rows(row, generator)
    for name, step in engines.items():
        gc.collect()
        peak = torch.tensor([peak_bytes(lambda step=step: step(rows))])  # type: ignore[misc]
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        results[name]["peak"] = int(peak)
    agree(results)
    parameters = sum(parameter.numel() for parameter in make_model(row).parameters())
    yield {"row": asdict(row), "parameters": parameters, "results": list(results.values())}


def make_model(row: StepRow, attention: str = "sdpa") -> torch.nn.Module:
    """The same small Llama for everyone, from one seed."""
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
    """A fresh DeepSpeed configuration: ZeRO-3, fp32, clipping."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def make_rows(row: StepRow, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One sequence, the same on every rank; a third of the labels are ignored, unevenly over the sequence."""
    ids = torch.randint(row.vocabulary, (1, row.length), generator=generator)
    labels = ids.clone()
    labels[:, : row.length // 3] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(row.length)[None]}


def load_ours(row: StepRow, memory: dict[str, Any] | None = None) -> tuple[str, Step]:
    """longctx as a user's own loop has it."""
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
    """DeepSpeed's engine, if the pinned version is installed."""
    peer = deepspeed_ulysses_engine
    version = installed(peer.PACKAGE, peer.PINNED)
    model = make_model(row)
    return version, peer.load(model, make_optimizer(model), make_config())


def turn(step: Step, rows: dict[str, torch.Tensor], result: dict[str, Any], timed: bool) -> None:
    """One step of one engine; its times, summed or the largest over ranks, go to ``result`` if ``timed``."""
    gc.collect()
    dist.barrier()
    sample = measure(lambda: result["loss"].append(step(rows)))
    blocked = float("nan") if sample.blocked is None else sample.blocked
    mine = torch.tensor([sample.cpu, sample.wall, blocked], dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone)
    if timed:
        result["cpu"].append(float(table[:, 0].sum()))
        result["wall"].append(float(table[:, 1].max()))
        result["blocked"].append(float(table[:, 2].max() / table[:, 1].max()))


def agree(results: dict[str, dict[str, Any]]) -> None:
    """Losses of both engines, step by step."""
    ours, theirs = results[OURS], results[THEIRS]
    if not theirs["loss"]:
        return
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours["loss"], theirs["loss"], strict=True))
    theirs["loss_difference"] = difference
    if not difference <= LOSS_LIMIT:
        both = f"{ours['loss']} {theirs['loss']}"
        raise AssertionError(f"losses differ by {difference:.1e} (limit {LOSS_LIMIT:.0e}): {both}")


def speed(ours: dict[str, Any], theirs: dict[str, Any], key: str) -> float:
    """Ours ÷ theirs in tokens a second, the median over turns."""
    return median(b / a for a, b in zip(ours[key], theirs[key], strict=True))


def verdicts(measured: dict[str, Any]) -> list[tuple[str, bool]]:
    """At least as many tokens a second as DeepSpeed's engine, in CPU time and on the wall."""
    ours, theirs = measured["results"]
    said = []
    if theirs["cpu"]:
        for key, title in (("cpu", "tokens per CPU second"), ("wall", "tokens per second")):
            ratio = speed(ours, theirs, key)
            said.append((f"training step: {title} ÷ {THEIRS} = {ratio:.3f}, required >= 1.000", ratio >= 1.0))
    return said

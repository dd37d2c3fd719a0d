"""All switches together: every pair of two switches' values trains what one plain process trains.

Meshes, ZeRO stages, recomputation, tiles and offloading are proven one by one elsewhere; here they meet.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tiny import make_engine, make_optimizer, ragged_rows, run_ranks, run_window, tiny_llama, train_plainly
from engine_tiny import weights_of as whole_weights

from tolerances import tolerance

SWITCHES: dict[str, tuple[Any, ...]] = {
    "mesh": ((2, 1, 1), (2, 1, 2), (1, 2, 1), (2, 2, 1)),  # ring, ulysses, data
    "stage": (0, 1, 2, 3),
    "recompute": ("none", "mlp", "layer", "layer_keep_attention"),
    "loss_tile": (None, 3),
    "mlp_tile": (None, 5),
    "offload": ("none", "optimizer", "optimizer and parameters"),
    "offload_checkpoints": (False, True),
    "recompute_norms": (False, True),
}
Cell = dict[str, Any]
STEPS = 3
NVME_SIZES = {"hidden_size": 520, "intermediate_size": 1031}
NVME_SWITCHES = {key: SWITCHES[key] for key in ("mesh", "recompute", "loss_tile", "mlp_tile")}
ON_NVME: list[Cell] = [
    dict(zip(NVME_SWITCHES, values, strict=True))
    for values in itertools.product(*NVME_SWITCHES.values())
    if math.prod(values[0]) <= 2  # four ranks would cut sub-groups below what is swapped
]


def legal(cell: Cell) -> bool:
    """What `check` and the engine accept."""
    if cell["offload"] != "none" and cell["stage"] == 0:
        return False
    if "parameters" in cell["offload"] and cell["stage"] != 3:
        return False
    return cell["recompute"].startswith("layer") or not cell["offload_checkpoints"]


def pairs(cell: Cell) -> set[Any]:
    return set(itertools.combinations(cell.items(), 2))


def covering(cells: list[Cell]) -> list[Cell]:
    """Return few cells that hold every pair of values that any of them holds: greedily, the richest first."""
    missing = set().union(*map(pairs, cells))
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def smooth_adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW that turns no last bit of a gradient near zero into a whole step."""
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-2, weight_decay=0.01)


def train_on_nvme(
    rank: int, world: int, cell: Cell, folder: str
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """As ``train``, with AdamW's states on disk, of a model whose sub-groups are large enough to be swapped."""
    import longctx

    ring, ulysses, _ = cell["mesh"]
    zero = {
        "stage": 3,
        "reduce_bucket_size": 5000,
        "stage3_param_persistence_threshold": 600,
        "sub_group_size": 700_000,  # several sub-groups, and places in them that no direct read can go to
        "offload_optimizer": {"device": "nvme", "nvme_path": folder},
    }
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    model = tiny_llama(**NVME_SIZES)
    optimizer = smooth_adamw(model)
    memory = {name: cell[name] for name in ("recompute", "loss_tile", "mlp_tile")}
    engine, *_ = longctx.initialize(
        model, settings, longctx.Mesh(ring=ring, ulysses=ulysses), optimizer=optimizer, memory=memory
    )
    losses, norms = [], []
    for step in range(STEPS):
        run_window(engine, [ragged_rows(step, index, engine.mesh.data_rank) for index in range(2)])
        losses.append(engine.global_loss)
        norms.append(engine.grad_norm)
    weights = whole_weights(engine)
    engine.destroy()
    assert len(list(Path(folder).rglob(f"rank{rank}/*exp_avg_sq*.swp"))) >= 2  # of several sub-groups
    return losses, norms, weights


LEGAL = [
    cell for values in itertools.product(*SWITCHES.values()) if legal(cell := dict(zip(SWITCHES, values, strict=True)))
]


def train(rank: int, world: int, cell: Cell) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    import longctx.engine.activations as engine_memory
    from longctx.models.activations.host import HostStore

    ring, ulysses, _ = cell["mesh"]
    names = ("recompute", "loss_tile", "mlp_tile", "offload_checkpoints", "recompute_norms")
    memory = {name: cell[name] for name in names}
    zero = {} if cell["offload"] == "none" else {"offload_optimizer": {"device": "cpu"}}
    if "parameters" in cell["offload"]:
        zero["offload_param"] = {"device": "cpu"}
    losses, norms = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_memory, "HostStore", functools.partial(HostStore, everything=True))  # there is no GPU
        engine = make_engine(ring, cell["stage"], ulysses=ulysses, model=tiny_llama(), gas=2, memory=memory, zero=zero)
        for step in range(STEPS):
            run_window(engine, [ragged_rows(step, index, engine.mesh.data_rank) for index in range(2)])
            losses.append(engine.global_loss)
            norms.append(engine.grad_norm)
        weights = whole_weights(engine)
        engine.destroy()
    return losses, norms, weights


@functools.cache
def truth_on_nvme(replicas: int) -> dict[str, Any]:
    model = tiny_llama(**NVME_SIZES)
    optimizer = smooth_adamw(model)
    return train_plainly(model, optimizer, steps=STEPS, replicas=replicas, accumulation=2, clip=0)


@functools.cache
def truth(replicas: int) -> dict[str, Any]:
    model = tiny_llama()
    optimizer = make_optimizer("sgd", model.parameters())
    return train_plainly(model, optimizer, steps=STEPS, replicas=replicas, accumulation=2, clip=0)


def name(cell: Cell) -> str:
    return "-".join(str(value).replace(" ", "_") for value in cell.values())


@pytest.mark.parametrize("cell", covering(LEGAL), ids=name)
def test_every_pair_of_switches_trains_the_same_model(cell: Cell) -> None:
    ring, ulysses, data = cell["mesh"]
    compare(run_ranks(ring * ulysses * data, train, cell), truth(data))


@pytest.mark.slow
@pytest.mark.parametrize("cell", covering(ON_NVME), ids=name)
def test_every_pair_of_switches_trains_the_same_model_on_nvme(cell: Cell, tmp_path: Path) -> None:
    """DeepSpeed compiles its operator at the first use, for minutes."""
    ring, ulysses, data = cell["mesh"]
    compare(run_ranks(ring * ulysses * data, train_on_nvme, cell, str(tmp_path)), truth_on_nvme(data))


def compare(ranks: list[Any], wanted: dict[str, Any]) -> None:
    for losses, norms, weights in ranks:
        torch.testing.assert_close(losses, wanted["losses"], rtol=tolerance("training loss"), atol=0)
        torch.testing.assert_close(norms, wanted["norms"], rtol=tolerance("training norm"), atol=0)
        for key, weight in wanted["weights"].items():
            assert (weights[key] - weight).norm() <= tolerance("training weight") * weight.norm(), key


def test_the_chosen_cells_hold_every_legal_pair() -> None:
    chosen = covering(LEGAL)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, LEGAL))
    assert len(chosen) < 30 < len(LEGAL)

"""longctx.hf counts batches, tokens and epochs by data replicas, and the ranks of a ring read the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import arguments, collate, dense_loss, history, packed_rows, reference, run_ranks, tiny_model, windows_of


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def trained(rank: int, world: int, folder: str, ring: int, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    from transformers import TrainingArguments

    import longctx

    rows: Any = packed_rows(given.pop("rows", 12))
    if kind == "stream":
        rows = Stream(rows)
    if kind == "different":
        rows = packed_rows(13)[rank:]
    model = tiny_model(attention_dropout=0.5 if kind == "dropout" else 0.0)
    args = TrainingArguments(**arguments(folder, "ddp", **given))
    trainer = longctx.hf.Trainer(
        model=model, args=args, train_dataset=rows, data_collator=collate, mesh=longctx.Mesh(ring=ring)
    )
    seeds: list[Any] = []
    if kind == "dropout":
        fetch = trainer.get_batch_samples

        def kept(*arguments: Any) -> Any:
            window, items = fetch(*arguments)
            seeds.append([batch["dropout_seeds"].tolist() for batch in window])
            return window, items

        trainer.get_batch_samples = kept
    trainer.train()
    state = trainer.state
    return {**history(trainer), "steps": state.global_step, "epoch": state.epoch, "seeds": seeds}


def test_a_short_last_window_and_epochs(tmp_path: Path) -> None:
    given = {"rows": 5, "max_steps": -1, "num_train_epochs": 2, "include_num_input_tokens_seen": "all"}
    rows = packed_rows(5)
    losses, norms, _ = reference([rows[:2], rows[2:4], rows[4:]] * 2)
    for found in run_ranks(2, trained, str(tmp_path), 2, "rows", given):
        assert found["losses"] == pytest.approx(losses, abs=1e-6)
        assert found["norms"] == pytest.approx(norms, rel=1e-5)
        assert (found["steps"], found["epoch"]) == (6, 2.0)
        assert found["input_tokens"][-1] == 10 * 66


def test_a_data_set_without_length(tmp_path: Path) -> None:
    losses, norms, _ = reference(windows_of(packed_rows(12), 3, 2))
    for found in run_ranks(2, trained, str(tmp_path), 2, "stream", {}):
        assert found["losses"] == pytest.approx(losses, abs=1e-6)
        assert found["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.deep
def test_without_an_average_over_devices_replicas_count_alike(tmp_path: Path) -> None:
    rows, model = packed_rows(12), tiny_model()
    means = [float(total.detach()) / count for total, count in (dense_loss(model, rows[i : i + 4 : 2]) for i in (0, 1))]
    for found in run_ranks(4, trained, str(tmp_path), 2, "rows", {"average_tokens_across_devices": False}):
        assert found["losses"][0] == pytest.approx(sum(means) / 2, abs=1e-6)


@pytest.mark.deep
@pytest.mark.parametrize("seedable", [True, False])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_shuffled_rows_are_the_same_on_a_ring(tmp_path: Path, strategy: str, seedable: bool, ranks: int) -> None:
    given = {
        "train_sampling_strategy": strategy, "accelerator_config": {"use_seedable_sampler": seedable},
        "max_steps": -1, "num_train_epochs": 2,
    }  # fmt: skip
    found = run_ranks(ranks, trained, str(tmp_path), 2, "rows", given)
    assert all(rank["losses"] == found[0]["losses"] for rank in found)


def test_seeds_of_dropout_count_steps_and_micro_batches(tmp_path: Path) -> None:
    from longctx.engine.dropout import row_seeds

    first, second = run_ranks(2, trained, str(tmp_path), 2, "dropout", {})
    assert first["seeds"] == second["seeds"]
    assert first["seeds"] == [[row_seeds(42, step, i, 1).tolist() for i in range(2)] for step in range(3)]


def refused(rank: int, world: int, folder: str, kind: str) -> str:
    try:
        trained(rank, world, folder, 2, kind, {})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_different_rows_on_one_ring_are_an_error(tmp_path: Path) -> None:
    for message in run_ranks(2, refused, str(tmp_path), "different"):
        assert message.startswith("EngineError: ranks [0, 1] share one sequence but passed different rows")

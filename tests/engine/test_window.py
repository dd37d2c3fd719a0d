"""Token weighting: the weighted losses of all ranks and micro-batches add up to the mean over all valid tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_tiny import run_ranks

from longctx.engine.step.rows import explicit_rows
from longctx.engine.step.window import shard_window, tokens_to_divide_by, weigh_window
from longctx.errors import EngineError
from longctx.mesh import Mesh
from longctx.sharding import unshard

from tolerances import tolerance

VOCABULARY = 11


def ragged_window(data_rank: int, micro_batches: int = 2) -> list[dict[str, torch.Tensor]]:
    """Rows of another length and with another share of ignored labels on each replica and in each micro-batch."""
    window = []
    for index in range(micro_batches):
        generator = torch.Generator().manual_seed(100 * data_rank + index)
        length = 13 + 5 * index + 3 * data_rank
        ids = torch.randint(0, VOCABULARY, (2, length), generator=generator)
        keep = torch.rand(2, length, generator=generator) < (0.9, 0.15, 0.5)[(index + data_rank) % 3]
        positions = torch.arange(length) % (7 + index)
        window.append({"input_ids": ids, "labels": ids.masked_fill(~keep, -100), "position_ids": positions})
    return window


def token_loss(batch: dict[str, Any]) -> torch.Tensor:
    """A stand-in for a model: a loss per token that depends on the token and its position only."""
    table = torch.linspace(-1, 1, VOCABULARY * VOCABULARY, dtype=torch.float64).sin().reshape(VOCABULARY, VOCABULARY)
    logits = table[batch["input_ids"]] * (1 + batch["position_ids"][..., None])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum")


def truth(data_size: int) -> tuple[float, int]:
    total, count = 0.0, 0
    for replica in range(data_size):
        for batch in map(explicit_rows, ragged_window(replica)):
            total += float(token_loss(batch))
            count += int((batch["shift_labels"] >= 0).sum())
    return total / count, count


def weighted(rank: int, world: int, ring: int, ulysses: int, layout: str) -> tuple[float, int]:
    mesh = Mesh(ring=ring, ulysses=ulysses)
    window = shard_window(ragged_window(mesh.data_rank), mesh, layout)
    again = weigh_window([{k: v for k, v in b.items() if k != "num_items_in_batch"} for b in window], mesh)
    assert [b["num_items_in_batch"] for b in again] == [b["num_items_in_batch"] for b in window]
    share = sum(float(token_loss(batch) / batch["num_items_in_batch"].double()) for batch in window)
    for full, local in zip(map(explicit_rows, ragged_window(mesh.data_rank)), window, strict=True):
        for key in ("input_ids", "position_ids", "document_ids", "shift_labels"):
            assert torch.equal(unshard(local[key], mesh, length=full[key].shape[1], layout=layout), full[key])
        assert torch.equal(local["labels"], local["shift_labels"]) and local["use_cache"] is False
    return share, sum(int((batch["shift_labels"] >= 0).sum()) for batch in window)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("world", "ring", "ulysses"), [(1, 1, 1), (2, 2, 1), (2, 1, 1), (4, 2, 1), (4, 2, 2)])
def test_shares_add_up_to_the_mean_over_all_valid_tokens(world: int, ring: int, ulysses: int, layout: str) -> None:
    results = run_ranks(world, weighted, ring, ulysses, layout)
    data_size = world // (ring * ulysses)
    mean, count = truth(data_size)
    assert sum(share for share, _ in results) / data_size == pytest.approx(mean, rel=tolerance("float32 divisor"))
    assert sum(tokens for _, tokens in results) == count  # no label is lost at a shard border, none counted twice


def test_no_label_at_all_divides_by_something() -> None:
    assert tokens_to_divide_by(0, 2) == 0.5
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "labels": torch.full((1, 8), -100)}
    assert float(shard_window(batch, Mesh(world_size=1))["num_items_in_batch"]) == 1.0


def test_a_dict_gives_a_dict_and_other_keys_are_cut_or_passed_on() -> None:
    mesh = Mesh(ring=2, world_size=2, rank=1, data=1)
    from longctx.engine.step.window import _shard

    batch = {"input_ids": torch.arange(8)[None], "token_type_ids": torch.arange(8)[None], "name": "row", "scale": 2.0}
    local = _shard(explicit_rows({**batch, "weight": torch.ones(3)}), mesh, "zigzag")
    assert local["token_type_ids"].tolist() == [[2, 3, 4, 5]]
    assert local["name"] == "row" and local["scale"] == 2.0 and local["weight"].shape == (3,)
    assert isinstance(shard_window(batch, Mesh(world_size=1)), dict)


def test_padding_is_never_a_label() -> None:
    mesh = Mesh(ring=2, world_size=2, rank=0, data=1)  # rank 0 of a zigzag holds the end of the padded row
    from longctx.engine.step.window import _shard

    ids = torch.arange(5)[None]
    more = {name: ids.clone() for name in ("mtp_labels", "labels_2", "next_targets", "token_type_ids", "label_mask")}
    more["label_mask"] = more["label_mask"] > 0
    more["soft_targets"] = torch.ones(1, 5, 3)
    local = _shard(explicit_rows({"input_ids": ids, "labels": ids, **more}), mesh, "zigzag")
    assert local["document_ids"][0, -1] == -1 and local["shift_labels"][0, -1] == -100
    assert all(local[name][0, -1] == -100 for name in ("mtp_labels", "labels_2", "next_targets"))
    assert local["token_type_ids"][0, -1] == 0 and not local["label_mask"][0, -1]
    assert local["soft_targets"][0, -1].tolist() == [0, 0, 0]


def weighed_apart(rank: int, world: int, key: str) -> str:
    """Rank 1 of the ring reads another row than rank 0, or one of another length."""
    mesh = Mesh(ring=2)
    window = shard_window(ragged_window(mesh.data_rank), mesh)
    for batch in window:
        batch["row_ids"] = torch.tensor([4, 5 + (rank == 1 and key == "row_ids")])
    if rank == 1 and key == "shape":
        window[0].update({name: window[0][name][:, :2] for name in ("input_ids", "position_ids", "document_ids")})
    with pytest.raises(EngineError) as error:
        weigh_window(window, mesh)
    for batch in window:
        batch["row_ids"] = torch.tensor([4, 5])
    assert key == "shape" or all("row_ids" not in batch for batch in weigh_window(window, mesh))
    return str(error.value)


@pytest.mark.parametrize("key", ["row_ids", "shape"])
def test_parts_of_different_rows_are_refused(key: str) -> None:
    for message in run_ranks(2, weighed_apart, key):
        assert "ranks [0, 1] share one sequence but passed different rows" in message


def refused(rank: int, world: int, fault: str) -> str:
    mesh = Mesh(ring=2)
    window = ragged_window(mesh.data_rank)
    if fault == "rows" and rank == 1:
        window[1]["input_ids"][0, 0] += 1
    if fault == "length" and rank == 0:
        window[0] = {key: value[..., :8] for key, value in window[0].items()}
    if fault == "micro-batches" and rank == 3:
        window = window[:1]
    if fault == "mask" and rank == 2:
        window[0]["attention_mask"] = torch.ones(2, 1, 4, 4)
    if fault == "type" and rank == 2:
        window[0]["labels"] = torch.tensor(["a" == "b"])
    with pytest.raises(EngineError) as error:
        shard_window(window, mesh)
    return str(error.value)


@pytest.mark.parametrize(
    ("fault", "everywhere", "culprit"),
    [
        ("rows", r"ranks \[0, 1\] share one sequence but passed different rows", None),
        ("length", r"ranks \[0, 1\] share one sequence but passed different rows", None),
        ("micro-batches", r"\[2, 2, 2, 1\] micro-batches", None),
        ("mask", r"ranks \[2\] rejected", (2, "attention_mask is")),
        ("type", r"ranks \[2\] rejected", (2, "labels is")),
    ],
)
def test_a_fault_on_one_rank_is_an_error_on_all(fault: str, everywhere: str, culprit: tuple[int, str] | None) -> None:
    import re

    for rank, message in enumerate(run_ranks(4, refused, fault)):
        wanted = culprit[1] if culprit and culprit[0] == rank else everywhere
        assert re.search(wanted, message), message

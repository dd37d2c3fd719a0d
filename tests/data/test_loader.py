"""Loading: every rank reads its own part of the same rows, in an order that no mesh, thread or resumption changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.loader import EvaluationLoader, ShardedLoader, local_positions
from longctx.data.rows import PackedRows
from longctx.data.tokens.file import TokenFile
from longctx.errors import DataError
from longctx.layout import get_layout
from longctx.mesh import Mesh

from distributed import run_ranks

KEYS = ("input_ids", "position_ids", "document_ids", "labels", "shift_labels")
Make = Callable[..., TokenFile]


def grid(rank: int = 0, ring: int = 1, ulysses: int = 1, data: int = 1) -> Mesh:
    return Mesh(ring, ulysses, data, world_size=ring * ulysses * data, rank=rank)


def expected_row(rows: PackedRows, row: int, padded: int) -> dict[str, list[int]]:
    """The row token by token, as one would explain it."""
    store, pieces = rows.pieces(row)
    result: dict[str, list[int]] = {key: [] for key in KEYS[:4]}
    for number, (start, length, document) in enumerate(zip(*(p.tolist() for p in pieces), strict=True)):
        for place in range(length):
            here = start + place
            ends_document = here + 1 == int(store.offsets[document + 1])
            result["input_ids"].append(int(store.tokens[here]))
            result["position_ids"].append(place)
            result["document_ids"].append(number)
            result["labels"].append(-100 if ends_document else int(store.tokens[here + 1]))
    pads = padded - len(result["input_ids"])
    for key, value in (("input_ids", 0), ("position_ids", 0), ("document_ids", -1), ("labels", -100)):
        result[key] += [value] * pads
    return result


@settings(max_examples=120, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    sequence_length=st.integers(2, 40),
    ring=st.sampled_from([1, 2, 3, 4]),
    ulysses=st.sampled_from([1, 2]),
    data=st.sampled_from([1, 2]),
    layout=st.sampled_from(["zigzag", "contiguous", "striped"]),
    packing=st.sampled_from(["concat", "best_fit"]),
    batch=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    consumed=st.integers(0, 50),
)
def test_parts_of_all_ranks_are_the_row(
    make_tokens: Make, lengths, sequence_length, ring, ulysses, data, layout, packing, batch, consumed
) -> None:
    file = make_tokens(lengths)
    padded = get_layout(layout).padded_length(sequence_length, ring, ulysses)
    rows = PackedRows(file, sequence_length, packing)
    whole = torch.full((batch[1], data, batch[0], len(KEYS), padded), 10**9)
    for rank in range(ring * ulysses * data):
        mesh = grid(rank, ring, ulysses, data)
        loader = ShardedLoader(
            file, sequence_length, micro_batch=batch[0], accumulation=batch[1], mesh=mesh, layout=layout,
            packing=packing, samples_consumed=consumed, prefetch=0,
        )  # fmt: skip
        where = torch.from_numpy(local_positions(sequence_length, mesh, layout))
        window = next(loader)
        assert len(window) == batch[1] and loader.samples_consumed == consumed + loader.samples_per_window
        for number, micro in enumerate(window):
            assert micro["use_cache"] is False
            assert {micro[key].shape for key in KEYS} == {(batch[0], padded // (ring * ulysses))}
            assert micro["document_ids"].dtype == torch.int32
            assert {micro[key].dtype for key in KEYS if key != "document_ids"} == {torch.int64}
            for place, key in enumerate(KEYS):
                whole[number, mesh.data_rank, :, place, where] = micro[key].long()
    ids = loader.row_ids(consumed)
    for index in np.ndindex(ids.shape):
        expected = expected_row(rows, int(ids[index]), padded)
        for place, key in enumerate(KEYS):
            name = "labels" if key == "shift_labels" else key
            assert whole[index][place].tolist() == expected[name]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(2, 40), st.sampled_from(["concat", "best_fit"])
)
def test_every_token_but_the_first_of_a_document_is_a_target_once(
    make_tokens: Make, lengths: list[int], sequence_length: int, packing: str
) -> None:
    """No target crosses documents, and none is lost at the border of a row."""
    file = make_tokens(lengths)  # token n of the file is n
    rows = PackedRows(file, sequence_length, packing)
    parts = [rows.read(row, np.arange(sequence_length)) for row in range(len(rows))]
    ids, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("input_ids", "labels"))
    kept = labels != -100
    assert (labels[kept] == ids[kept] + 1).all()
    firsts = set(file.offsets[:-1].tolist())
    assert sorted(labels[kept].tolist()) == [n for n in range(sum(lengths)) if n not in firsts]


class Recorder:
    """Stands for the tokens of a file and notes which were read."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.read, self.shape = tokens, set(), tokens.shape

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        self.read.update(index.tolist())
        return self.tokens[index]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_a_rank_reads_its_own_tokens_and_one_more(make_tokens: Make, layout: str) -> None:
    file = make_tokens([64])
    file.tokens = Recorder(file.tokens)
    for rank in range(4):
        file.tokens.read.clear()
        mesh = grid(rank, ring=4)
        window = next(ShardedLoader(file, 64, mesh=mesh, layout=layout, prefetch=0))
        own = set(window[0]["input_ids"].flatten().tolist())
        assert len(own) == 16 and file.tokens.read <= own | {token + 1 for token in own}


def worker(rank: int, world_size: int, path: str, layout: str) -> bool:
    import longctx

    mesh = longctx.Mesh(ring=2, ulysses=2)
    loader = ShardedLoader(path, 61, micro_batch=2, mesh=mesh, layout=layout, prefetch=1)
    full = ShardedLoader(path, 61, micro_batch=2, mesh=None, layout=layout, prefetch=0)
    same = True
    for _ in range(3):
        local, rows = next(loader)[0], next(full)[0]
        for key in KEYS:
            whole = rows[key][:, :61]
            same &= torch.equal(longctx.unshard(local[key], mesh, dim=1, length=61, layout=layout), whole)
            pad = {"document_ids": -1, "labels": -100, "shift_labels": -100}.get(key, 0)
            same &= torch.equal(local[key], longctx.shard(whole, mesh, dim=1, layout=layout, pad_value=pad))
    loader.close()
    return same


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_real_ranks(make_tokens: Make, layout: str) -> None:
    path = str(make_tokens([9, 30, 61, 100, 7] * 4).path)
    assert run_ranks(4, worker, path, layout) == [True] * 4


def sample_log(file: TokenFile, data: int, prefetch: int, begin: int, end: int) -> list[int]:
    """Rows read from sample ``begin`` to ``end``, in order, recognised by their first token."""
    loaders = [
        ShardedLoader(
            file,
            4,
            micro_batch=40 // data // 2,
            accumulation=2,
            mesh=grid(rank, data=data),
            seed=5,
            packing="concat",
            prefetch=prefetch,
        )  # fmt: skip
        for rank in range(data)
    ]
    log: list[int] = []
    for loader in loaders:
        loader.seek(begin)
    while loaders[0].samples_consumed < end:
        windows = [next(loader) for loader in loaders]
        for number in range(2):
            log += [int(n) // 4 for window in windows for n in window[number]["input_ids"][:, 0]]
    for loader in loaders:
        loader.close()
    return log


def test_sample_log_of_ten_thousand(make_tokens: Make) -> None:
    """1, 2 and 4 replicas, prefetch on and off, three resumptions on other numbers of replicas: one log."""
    file = make_tokens([4] * 3000)
    first = sample_log(file, 1, 0, 0, 10_000)
    for epoch in range(3):
        assert sorted(first[epoch * 3000 : (epoch + 1) * 3000]) == list(range(3000))
    assert sample_log(file, 4, 2, 0, 10_000) == first
    stops = [0, 1240, 1280, 6000, 10_000]
    parts = zip((1, 4, 2, 4), (2, 0, 1, 3), stops[:-1], stops[1:], strict=True)
    assert [row for part in parts for row in sample_log(file, *part)] == first


def test_eight_replicas_have_the_same_order(make_tokens: Make) -> None:
    file = make_tokens([4] * 3000)
    orders = []
    for data in (1, 2, 4, 8):
        mesh = grid(0, data=data)
        loader = ShardedLoader(file, 4, micro_batch=16 // data, mesh=mesh, packing="concat", prefetch=0)
        orders.append([row for at in range(0, 10_000, 16) for row in loader.row_ids(at).flatten().tolist()])
    assert orders[1:] == orders[:1] * 3


def test_state_is_one_integer_and_fits_only_its_data(make_tokens: Make) -> None:
    file = make_tokens([4] * 100)
    with ShardedLoader(file, 4, micro_batch=3, prefetch=2) as loader:
        for _ in range(5):
            next(loader)
        state = loader.state_dict()
        expected = next(loader)
    assert state == {"samples_consumed": 15, "seed": 0, "data": loader.rows.identity}
    for prefetch in (0, 2):
        with ShardedLoader(file, 4, micro_batch=3, prefetch=prefetch) as again:
            next(again)
            again.load_state_dict(state)
            assert torch.equal(next(again)[0]["input_ids"], expected[0]["input_ids"]) and again.samples_consumed == 18
    for other in (
        ShardedLoader(make_tokens([4] * 101), 4, micro_batch=3),
        ShardedLoader(file, 5, micro_batch=3),
        ShardedLoader(file, 4, micro_batch=3, seed=1),
        ShardedLoader(file, 4, micro_batch=3, packing="concat"),
    ):
        with pytest.raises(DataError, match="cannot continue"):
            other.load_state_dict(state)


def test_several_files_are_one_data_set(make_tokens: Make) -> None:
    files = [make_tokens([4] * 5), make_tokens([3] * 4)]
    rows = PackedRows(files, 4, "concat")
    assert len(rows) == 8 and rows.token_count == 32
    assert rows.read(5, np.arange(4)).input_ids.tolist() == [0, 1, 2, 3]
    with pytest.raises(IndexError):
        rows.pieces(8)


def test_file_changed_under_the_loader(make_tokens: Make) -> None:
    file = make_tokens([4] * 100)
    loader = ShardedLoader(file, 4, prefetch=0)
    next(loader)
    with open(file.path, "r+b") as stream:
        stream.seek(300)
        stream.write(b"\xff" * 8)
    with pytest.raises(DataError, match="was written to while in use"):
        next(loader)


def test_bad_token_is_named_with_its_place(make_tokens: Make) -> None:
    file = make_tokens([4] * 100)
    file.vocabulary_size = 250
    loader = ShardedLoader(file, 4, micro_batch=100, packing="concat", shuffle=False)
    with pytest.raises(DataError, match=r"token 250 .* is 250, outside the vocabulary of 250"):
        next(loader)
    loader.close()


def test_bad_arguments(make_tokens: Make) -> None:
    file = make_tokens([4] * 10)
    for wrong in ({"micro_batch": 0}, {"accumulation": 0}, {"samples_consumed": -1}, {"prefetch": -1}):
        with pytest.raises(DataError, match="must be at least"):
            ShardedLoader(file, 4, **wrong)
    with pytest.raises(DataError, match="written with tokenizer"):
        ShardedLoader(file, 4, tokenizer_hash="00" * 32)
    with pytest.raises(DataError, match="vocabulary is 5:"):
        ShardedLoader(file, 4, vocabulary_size=5)
    with pytest.raises(DataError, match="no token file was given"):
        ShardedLoader([], 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.sampled_from([1, 2, 3]), st.sampled_from([None, 1, 5, 100]))
def test_evaluation_reads_each_row_once_in_equal_numbers(
    make_tokens: Make, rows: int, micro_batch: int, data: int, max_rows: int | None
) -> None:
    file = make_tokens([4] * rows)
    loaders = [
        EvaluationLoader(
            file, 4, micro_batch=micro_batch, mesh=grid(rank, data=data), packing="concat", max_rows=max_rows
        )
        for rank in range(data)
    ]
    seen: list[int] = []
    counts = set()
    for loader in loaders:
        windows = list(loader)
        counts |= {len(windows), len(loader)}
        for (micro,) in windows:
            assert micro["input_ids"].shape == (micro_batch, 4)
            for row in range(micro_batch):
                if micro["document_ids"][row, 0] >= 0:
                    seen.append(int(micro["input_ids"][row, 0]) // 4)
                else:
                    assert (micro["labels"][row] == -100).all() and (micro["document_ids"][row] == -1).all()
    assert len(counts) == 1
    assert len(seen) == len(set(seen)) == min(rows, max_rows or rows)
    assert [w[0]["input_ids"].tolist() for w in loaders[0]] == [w[0]["input_ids"].tolist() for w in loaders[0]]

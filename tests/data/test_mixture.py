"""Mixing: every source has its share in any number of samples, every row once per epoch of it, on any mesh."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.build import TokenBuild, build_tokens
from longctx.data.loader import ShardedLoader
from longctx.data.mixture import PERIOD, MixedOrder
from longctx.data.rows import PackedRows
from longctx.errors import DataError
from longctx.mesh import Mesh


@settings(max_examples=12, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 10)), min_size=1, max_size=5),
    seed=st.integers(-5, 2**40),
    shuffle=st.booleans(),
    count=st.integers(1, 3 * PERIOD),
)
def test_shares_and_epochs(parts: list[tuple[int, float]], seed: int, shuffle: bool, count: int) -> None:
    rows, weights = [n for n, _ in parts], [w for _, w in parts]
    order = MixedOrder(rows, weights, seed, shuffle)
    found = order(np.arange(count))
    first = np.cumsum([0, *rows])
    source = np.searchsorted(first, found, side="right") - 1
    assert order.counts(count) == np.bincount(source, minlength=len(rows)).tolist()
    for number, (size, weight) in enumerate(parts):
        own = found[source == number] - first[number]
        assert abs(own.size - count * weight / sum(weights)) < 32 + 2 * (1 + count / PERIOD)
        if not shuffle:
            assert own.tolist() == [n % size for n in range(own.size)]
    # a block that ends is a whole number of samples of each source, each row as often as any other to within one
    whole = order(np.arange(count // 32 * 32))
    for number, size in enumerate(rows):
        times = np.bincount(
            whole[(whole >= first[number]) & (whole < first[number + 1])] - first[number], minlength=size
        )
        assert times.max() - times.min() <= 1
    some = np.random.default_rng(0).integers(0, count, 7)
    assert order(some).tolist() == found[some].tolist()  # any sample at once


def test_where_it_stops() -> None:
    order = MixedOrder([100, 10], [1, 1], seed=3)
    last = order.until_repeated()
    assert 18 <= last <= 52 and order.counts(last)[1] == 10 and order.counts(last + 1)[1] == 11
    assert MixedOrder([7], [2.0]).until_repeated() == 7


@pytest.mark.parametrize(
    ("weights", "words"),
    [([1], "one positive number for each of the 2"), ([1, 0], "positive"), ([1, float("nan")], "positive"),
     ([1, 1e-9], "below 1/4096")],
)  # fmt: skip
def test_weights_are_checked(weights: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        MixedOrder([3, 4], weights)


@pytest.fixture
def built(tmp_path: Path) -> TokenBuild:
    for name in ("a", "b", "c"):
        rows = [{"text": f"{name} {number} " * 30} for number in range(30 if name == "a" else 12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return build_tokens([tmp_path / f"{name}.jsonl" for name in "abc"], "bytes", tmp_path / "out", held_out=0.1)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_rows_are_of_one_source(built: TokenBuild, packing: str) -> None:
    rows = PackedRows(built.train, 100, packing, by_source=True)
    assert [Path(name).stem for name, _ in rows.sources] == ["a", "b", "c"]
    assert len(rows) == sum(count for _, count in rows.sources)
    names = [chr(rows.stores[0].document(int(rows.pieces(row)[1].documents[0]))[0]) for row in range(len(rows))]
    for row in range(len(rows)):
        store, pieces = rows.pieces(row)
        assert {chr(store.document(n)[0]) for n in pieces.documents.tolist()} == {names[row]}
    assert names == [name for name, (_, count) in zip("abc", rows.sources, strict=True) for _ in range(count)]
    seen = np.concatenate([rows.read(row, np.arange(100)).labels for row in range(len(rows))])
    assert (seen >= 0).sum() == rows.token_count - rows.stores[0].document_count  # every token once


def consumed(built: TokenBuild, data: int, begin: int, end: int) -> list[int]:
    """Rows of samples ``begin`` to ``end`` on a mesh of ``data`` replicas."""
    found: list[np.ndarray] = []
    for rank in range(data):
        mesh = Mesh(1, 1, data, world_size=data, rank=rank)
        loader = ShardedLoader(
            built.train, 100, micro_batch=8 // data, accumulation=2, mesh=mesh, weights=[3, 1, 1], prefetch=2, seed=4
        )
        loader.seek(begin)
        mine = []
        while loader.samples_consumed < end:
            mine += [batch["row_ids"].numpy() for batch in next(loader)]
        loader.close()
        found.append(np.stack(mine))
    return np.stack(found, axis=1).flatten().tolist()


def test_the_mesh_and_resuming_do_not_change_the_mixture(built: TokenBuild) -> None:
    whole = consumed(built, 1, 0, 320)
    assert consumed(built, 4, 0, 320) == whole
    assert consumed(built, 2, 0, 160) + consumed(built, 4, 160, 320) == whole
    loader = ShardedLoader(built.train, 100, weights=[3, 1, 1], seed=4)
    state = loader.state_dict()
    mixture = loader.mixture(320)
    assert [source["samples"] for source in mixture] == [192, 64, 64] and mixture[1]["epochs"] == 64 / mixture[1][
        "rows"
    ]
    with pytest.raises(DataError, match="cannot continue: the checkpoint counted samples of data"):
        ShardedLoader(built.train, 100, weights=[1, 1, 1], seed=4).load_state_dict(state)
    with pytest.raises(DataError, match="one positive number for each of the 3 sources"):
        ShardedLoader(built.train, 100, weights=[1, 2])


def test_an_exhausted_source_stops_or_repeats(built: TokenBuild) -> None:
    loader = ShardedLoader(built.train, 100, micro_batch=2, accumulation=2, weights=[3, 1, 1], repeat=False, prefetch=0)
    windows = sum(1 for _ in loader)
    assert windows == loader.windows_in_all and windows > 3
    assert all(source["epochs"] <= 1 for source in loader.mixture(loader.samples_consumed))
    assert any(source["epochs"] > 1 for source in loader.mixture(loader.samples_consumed + 40))
    once = ShardedLoader(built.train, 100, repeat=False)
    assert sum(1 for _ in once) == len(once.rows) == once.windows_in_all
    assert ShardedLoader(built.train, 100).windows_in_all is None


def test_a_source_without_documents_and_an_old_file_are_named(built: TokenBuild, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "alone"}')
    pair = build_tokens([tmp_path / "a.jsonl", tmp_path / "d.jsonl"], "bytes", tmp_path / "pair", held_out=0.5, seed=1)
    rows = dict(PackedRows(pair.train, 100, by_source=True).sources)
    if rows[str(tmp_path / "d.jsonl")] == 0:
        with pytest.raises(DataError, match="d.jsonl: none of its documents is in the training data"):
            ShardedLoader(pair.train, 100, weights=[1, 1])
    store = PackedRows(built.train, 100).stores[0]
    store.metadata.pop("by_source")
    with pytest.raises(DataError, match="does not say which source"):
        ShardedLoader(store, 100, weights=[1, 1, 1])

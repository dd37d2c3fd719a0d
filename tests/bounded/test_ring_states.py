"""States on a ring: given and returned on every rank, with the gradients of one device; any ring can continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bounded import direct, ranks
from bounded.ring_states import DOCUMENTS, LENGTH, check, cut, setting, vector

from longctx.attention import simulate
from longctx.attention.comm import Link
from longctx.bounded.abc import clusters

from tolerances import tolerance

EXACT = tolerance("fp64")


@pytest.fixture(autouse=True)
def centroids_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Update centroids within sequences as short as these."""
    monkeypatch.setattr(clusters, "PERIOD", 5)


CAUSAL = [name for name, case in ranks.CASES.items() if case.causal]
WHOLE = ["bidirectional", "bidirectional pair", "bidirectional random sum", "bidirectional cosine"]


def on_rings(name: str, documents: str, rings: list[tuple[int, str]]) -> None:
    leaves, ids, state, weight = setting(name, documents)
    expected = vector(name, leaves, weight, ids, state, 1)
    for ring, layout in rings:
        parts = ranks.indices(layout, ring, LENGTH)

        def worker(link: Link, parts: Any = parts, layout: str = layout, ring: int = ring) -> Any:
            here = parts[link.rank]
            own = None if ids is None else ids[:, here]
            return vector(name, cut(name, leaves, here), weight[:, :, here], own, state, ring, layout, link)

        found, _ = simulate.run(ring, worker)
        check(name, expected, found, torch.cat(parts).argsort())


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str) -> None:
    on_rings(name, "packed", [(2, "zigzag"), (3, "contiguous")])
    on_rings(name, "none", [(4, "zigzag")])


@pytest.mark.parametrize("name", WHOLE)
def test_over_all_tokens(name: str) -> None:
    on_rings(name, "none", [(2, "contiguous"), (3, "zigzag")])


@pytest.mark.deep
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_more_rings(name: str, documents: str) -> None:
    on_rings(name, documents, [(r, layout) for r in (2, 3, 4, 12) for layout in ("contiguous", "zigzag")])


@pytest.mark.parametrize("name", ["prefix pair", "running", "linformer", "compressive", "cosine value"])
def test_a_sequence_moves_from_ring_to_ring(name: str, tmp_path: Path) -> None:
    """Compute 3 tokens on one device, 24 on a ring of 3, save and load, swap the rows, and the rest on a ring of 2."""
    leaves, _ = ranks.inputs(name, 3 + 24 + 12)
    ids = direct.packed([[(-1, 1), (4, 20), (5, 18)], [(2, 5), (3, 22), (7, 12)]])
    expected = ranks.call(name, leaves, ids, "zigzag", None)

    def run(start: int, stop: int, ring: int, layout: str, state: Any, rows: Any) -> tuple[torch.Tensor, Any]:
        mine = cut(name, leaves, slice(start, stop))
        mine = [x[rows] if place < 3 or ranks.CASES[name].local else x for place, x in enumerate(mine)]
        parts = ranks.indices(layout, ring, stop - start)

        def worker(link: Link) -> Any:
            here = parts[link.rank]
            own = ids[rows, start:stop][:, here]
            return ranks.call(name, cut(name, mine, here), own, layout, link, state=state, return_state=True)

        found, _ = simulate.run(ring, worker)
        return torch.cat([out for out, _ in found], 2)[:, :, torch.cat(parts).argsort()], found[ring // 2][1]

    both, swapped = torch.tensor([0, 1]), torch.tensor([1, 0])
    one, state = run(0, 3, 1, "contiguous", None, both)
    two, state = run(3, 27, 3, "contiguous", state, both)
    torch.save(vars(state), tmp_path / "state.pt")
    state = type(state)(**torch.load(tmp_path / "state.pt", weights_only=True)).select(swapped)
    three, _ = run(27, 39, 2, "zigzag", state, swapped)
    ours = torch.cat([one, two, three[swapped]], 2)
    assert direct.differences([ours], [expected])[0] <= EXACT


@pytest.mark.parametrize("length", [48, 96])
def test_bytes_are_those_of_the_formulas(length: int) -> None:
    """A returned state is sent from every rank to every other; that of clusters from each rank to the next."""
    ring, batch, groups, width, out = 4, 2, 2, 5, 3
    state = 8 * batch * groups * ranks.SLOTS * (width + out + 1)
    seen = 8 * 2 * batch * groups * ranks.SLOTS * (width + 1)
    leaves, weight = ranks.inputs("prefix", length)

    def sent(name: str, total: bool) -> list[tuple[int, int]]:
        parts = ranks.indices("contiguous", ring, length)

        def worker(link: Link) -> None:
            here = parts[link.rank]
            mine = [x[:, :, here].requires_grad_() for x in leaves[: 3 + ranks.CASES[name].tensors]]
            found = ranks.call(name, mine, None, "contiguous", link, return_state=total)
            (found[0] if total else found).backward(weight[:, :, here])

        return [(c.messages, c.bytes) for c in simulate.run(ring, worker)[1]]

    for messages, nbytes in sent("prefix", True):
        assert messages == 2 * (ring - 1)
        assert nbytes == (2 * state + 8 * batch) * (ring - 1)
    plain = sent("prefix", False)
    for rank, (messages, nbytes) in enumerate(sent("cluster", False)):
        hops = int(rank < ring - 1)
        assert messages == plain[rank][0] + hops
        assert nbytes == plain[rank][1] + hops * (seen + 8 * batch)

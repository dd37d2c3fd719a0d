"""Bounded states over simulated rings: every form and control equals one device and sends the predicted bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounded import direct, ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention import simulate
from longctx.attention.comm import Link
from longctx.bounded.abc import clusters
from longctx.errors import AttentionError

from tolerances import tolerance

EXACT = tolerance("fp64")


@pytest.fixture(autouse=True)
def centroids_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Update centroids within sequences as short as these."""
    monkeypatch.setattr(clusters, "PERIOD", 5)


DOCUMENTS = {
    "none": None,
    "packed": direct.packed([[(-1, 3), (4, 17), (5, 23), (-1, 5)], [(2, 1), (3, 8), (7, 39)]]),
    "padded": direct.packed([[(-1, 7), (0, 41)], [(0, 40), (-1, 8)]]),
    "holes": direct.packed([[(3, 4), (-1, 3), (3, 9), (-1, 24), (3, 8)], [(-1, 2), (1, 1), (-1, 19), (1, 20), (2, 6)]]),
}
CROSSING = {
    "long": direct.packed([[(1, 5), (2, 31), (3, 1), (4, 11)], [(1, 11), (-1, 26), (2, 11)]]),
    "short": direct.packed([[(1, 3), (2, 2), (-1, 1), (3, 4), (4, 2), (5, 20), (-1, 16)], [(9, 24), (-1, 2), (9, 22)]]),
    "on borders": direct.packed([[(1, 8), (2, 16), (3, 24)], [(1, 12), (2, 12), (3, 12), (4, 12)]]),
}
"""Documents that end, begin or continue at the borders of stretches; with padding between and within them."""
RINGS = [(2, "contiguous"), (4, "contiguous"), (2, "zigzag"), (3, "zigzag")]
MORE_RINGS = [(3, "contiguous"), (6, "contiguous"), (12, "contiguous"), (4, "zigzag"), (6, "zigzag"), (12, "zigzag")]


def check(name: str, documents: str, rings: list[tuple[int, str]]) -> None:
    leaves, weight = ranks.inputs(name)
    ids = (DOCUMENTS | CROSSING)[documents]
    expected = ranks.one_device(name, leaves, weight, ids)
    for ring, layout in rings:
        found, _ = ranks.simulated(ring, layout, name, leaves, weight, ids)
        assert max(direct.differences(found, expected)) <= EXACT, (ring, layout)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("name", [name for name, case in ranks.CASES.items() if case.causal])
def test_causal(name: str, documents: str) -> None:
    check(name, documents, RINGS)


@pytest.mark.parametrize("documents", ["none", "padded"])
@pytest.mark.parametrize("name", [name for name, case in ranks.CASES.items() if not case.causal])
def test_over_all_tokens(name: str, documents: str) -> None:
    check(name, documents, RINGS[1:])


@pytest.mark.parametrize("documents", CROSSING)
@pytest.mark.parametrize("name", ["bidirectional pair", "bidirectional random sum", "bidirectional cosine"])
def test_packed_documents_without_causal(name: str, documents: str) -> None:
    """Each document has its own state, whichever stretches hold its tokens."""
    check(name, documents, [(3, "contiguous"), (4, "zigzag"), (8, "contiguous")])


REPEATED = {
    "again": [[(4, 7), (5, 3), (4, 20), (-1, 2), (4, 3), (6, 5), (4, 8)], [(1, 20), (0, 1), (1, 27)]],
    "on borders": [[(1, 12), (2, 12), (1, 24)], [(1, 8), (2, 8), (1, 8), (2, 8), (1, 8), (2, 8)]],
    "behind a whole stretch": [[(1, 6), (2, 36), (1, 6)], [(3, 2), (1, 4), (3, 2), (3, 16), (1, 22), (3, 2)]],
}
"""Ids that return after another id, in one stretch, in several, and on both sides of a border."""


@pytest.mark.parametrize("documents", REPEATED)
@pytest.mark.parametrize("name", ranks.CASES)
def test_an_id_that_returns_is_a_new_document(name: str, documents: str) -> None:
    """A document is a run of one id: the result equals that of a unique id per run, on any ring."""
    leaves, weight = ranks.inputs(name)
    ids = direct.packed(REPEATED[documents])
    expected = ranks.one_device(name, leaves, weight, direct.numbered(ids))
    for ring, layout in [(1, "contiguous"), *RINGS[1:]]:
        found, _ = ranks.simulated(ring, layout, name, leaves, weight, ids)
        assert max(direct.differences(found, expected)) <= EXACT, (ring, layout)


@settings(max_examples=15)
@given(st.integers(1, 4), st.sampled_from(["contiguous", "zigzag"]), st.booleans(), st.integers(0, 2**16))
def test_packed_documents_without_causal_are_as_defined(ring: int, layout: str, cosine: bool, seed: int) -> None:
    name = "bidirectional cosine" if cosine else "bidirectional"
    leaves, weight = ranks.inputs(name, seed=seed)
    ids = direct.random_documents(2, 48, torch.Generator().manual_seed(seed))
    leaves = [x.requires_grad_() for x in leaves]
    seen = direct.visible(48, ids, causal=False)
    if cosine:
        out = direct.cosine(*leaves, seen, "query")
    else:
        out = direct.abc(*leaves, leaves[3], seen, "prefix", 0.7)
    expected = [out, *direct.gradients(out, weight, leaves)]
    found, _ = ranks.simulated(ring, layout, name, [x.detach() for x in leaves], weight, ids)
    assert max(direct.differences(found, expected)) <= EXACT


@pytest.mark.deep
@pytest.mark.parametrize("documents", DOCUMENTS | CROSSING)
@pytest.mark.parametrize("name", ranks.CASES)
def test_larger_rings(name: str, documents: str) -> None:
    check(name, documents, MORE_RINGS)


@pytest.mark.parametrize("name", ["prefix", "cosine value", "bidirectional", "bidirectional cosine", "compressive"])
def test_tokens_beyond_the_length_are_padding(name: str) -> None:
    leaves, weight = ranks.inputs(name)
    expected = ranks.one_device(name, leaves, weight, None, length=43)
    shorter, cut = ranks.inputs(name)
    shorter = [x[:, :, :43] if x.dim() == 4 and x.shape[2] == 48 else x for x in shorter]
    alone = ranks.one_device(name, shorter, cut[:, :, :43], None)
    assert direct.differences([expected[0][:, :, :43]], [alone[0]])[0] <= EXACT  # type: ignore[index]
    found, _ = ranks.simulated(3, "zigzag", name, leaves, weight, None, length=43)
    assert max(direct.differences(found, expected)) <= EXACT


def stages(name: str, ring: int, layout: str, length: int, documents: torch.Tensor | None = None) -> list[list[int]]:
    """Return (messages, bytes) of every rank, forward and backward together."""
    leaves, weight = ranks.inputs(name, length)
    _, counters = ranks.simulated(ring, layout, name, leaves, weight, documents)
    assert all(c.bytes == c.state_bytes for c in counters)
    return [[c.messages, c.bytes] for c in counters]


def test_bytes_are_those_of_the_formulas_at_any_length() -> None:
    """One exchange each way: b h n (d_k + d_v + 1) numbers of ABC, b h d_k d_v of Cottention, to every later rank and
    back; and 8 bytes per row, forward, for the document that a state belongs to."""
    batch, groups, heads, slots, width, out, size, ring = 2, 2, 4, ranks.SLOTS, 5, 3, 8, 4
    states = {
        "prefix": batch * groups * slots * (width + out + 1) * size,
        "cosine value": batch * heads * width * out * size,  # one exponent, so one state, per query head
        "cosine query": batch * groups * width * out * size,
    }
    for name, state in states.items():
        for length in (48, 480):
            for rank, (messages, sent) in enumerate(stages(name, ring, "contiguous", length)):
                later, earlier = ring - 1 - rank, rank
                assert messages == later + earlier == ring - 1
                assert sent == later * (state + 8 * batch) + earlier * state
    running = batch * groups * slots
    for rank, (messages, sent) in enumerate(stages("running", ring, "contiguous", 48)):
        later, earlier = ring - 1 - rank, rank
        assert messages == 2 * (ring - 1)  # first the masses, then the states
        assert sent == (running + running * (width + out)) * size * (ring - 1) + later * 2 * 8 * batch
    for length in (48, 480):
        for _, (messages, sent) in enumerate(stages("bidirectional", ring, "zigzag", length)):
            assert messages == 2 * (ring - 1)
            assert sent == (2 * states["prefix"] + 8 * batch) * (ring - 1)
            documents = direct.random_documents(batch, length, torch.Generator().manual_seed(length))
            for messages, sent in stages("bidirectional", ring, "contiguous", length, documents):
                # the last document goes to later ranks, the first to earlier ones, whatever the length
                assert messages == 2 * (ring - 1)
                assert sent == (2 * states["prefix"] + 8 * batch) * (ring - 1)


@pytest.mark.parametrize("name", ["prefix", "running", "random sum", "window", "dilated", "compressive"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_bytes_do_not_grow(name: str, layout: str) -> None:
    assert stages(name, 2, layout, 160) == stages(name, 2, layout, 320)


@pytest.mark.parametrize("frozen", range(4))
def test_every_rank_reaches_every_exchange(frozen: int) -> None:
    """Freeze each input in turn: backward still reaches every exchange, so no rank hangs."""
    parts = ranks.indices("zigzag", 3, 48)
    for name in ("prefix", "running", "cosine value", "bidirectional"):
        leaves, weight = ranks.inputs(name)

        def worker(
            link: Link, name: str = name, leaves: list[torch.Tensor] = leaves, weight: torch.Tensor = weight
        ) -> torch.Tensor:
            here = parts[link.rank]
            dealt = [x[:, :, here] if x.dim() == 4 else x for x in leaves]
            mine = [x.clone().requires_grad_(place != frozen) for place, x in enumerate(dealt)]
            out = ranks.call(name, mine, None, "zigzag", link)
            out.backward(weight[:, :, here])
            return out

        simulate.run(3, worker)


def refuse(message: str, layout: str, name: str, documents: torch.Tensor | None, **more: Any) -> None:
    leaves, _ = ranks.inputs(name)

    def worker(link: Link) -> Any:
        here = slice(24 * link.rank, 24 * link.rank + 24)
        mine = [x[:, :, here] if x.dim() == 4 else x for x in leaves]
        return ranks.call(name, mine, None if documents is None else documents[:, here], layout, link, **more)

    with pytest.raises(AttentionError, match=message):
        simulate.run(2, worker)


def test_what_a_ring_cannot_do_is_refused() -> None:
    refuse("interleaves tokens", "striped", "prefix", None)
    refuse("interleaves tokens", "striped", "cosine value", None)
    for name in ("bidirectional", "bidirectional cosine"):
        refuse("have one state per document", "zigzag", name, DOCUMENTS["packed"], return_state=True)

"""Tokens join the nearest centroid: online as in a loop over tokens, on any number of ranks, and by k-means."""

from __future__ import annotations

import pytest
import torch
from bounded import direct
from bounded.inputs import PACKED, qkv
from drawn.draw import global_indices

from longctx.attention import simulate
from longctx.attention.comm import Link
from longctx.bounded.abc import clusters, control
from longctx.bounded.abc.operator import abc_attention
from longctx.bounded.ranks.sequence import locate

from tolerances import tolerance

SLOTS = 4


@pytest.fixture(autouse=True)
def centroids_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Update centroids within sequences as short as these."""
    monkeypatch.setattr(clusters, "PERIOD", 5)


def by_a_loop(k: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the slot of every token (B, G, T), token by token; 0 at padding."""
    found = torch.zeros(k.shape[:3], dtype=torch.int64)
    for row, names in enumerate(direct.numbered(ids).tolist()):
        for group in range(k.shape[1]):
            members: list[list[torch.Tensor]] = []
            position, last = 0, None
            for t, name in enumerate(names):
                if name < 0:
                    continue
                if name != last:
                    members, position, last = [[] for _ in range(SLOTS)], 0, name
                if position >= SLOTS and (position - SLOTS) % clusters.PERIOD == 0:
                    centroids = torch.stack([torch.stack(keys).mean(0) for keys in members])
                slot = position
                if position >= SLOTS:
                    slot = int((centroids - k[row, group, t]).norm(dim=-1).argmin())
                members[slot].append(k[row, group, t])
                found[row, group, t] = slot
                position += 1
    return found


def positions(ids: torch.Tensor) -> torch.Tensor:
    return direct.counts(direct.visible(ids.shape[1], direct.numbered(ids))) - 1


def test_online_assignment_is_that_of_a_loop_in_any_parts() -> None:
    (_, k, _), *_ = qkv()
    k, index = k.detach(), positions(PACKED)
    for cuts in ([37], [7, 1, 20, 9]):
        seen, document, found = clusters.empty(k, SLOTS), torch.tensor([-1, -1]), []
        for part in torch.arange(37).split(cuts):
            slot, seen, document = clusters.follow(k[:, :, part], index[:, part], PACKED[:, part], seen, document)
            found.append(slot)
        assert torch.cat(found, 2).equal(by_a_loop(k, PACKED)), cuts
        assert document.tolist() == [5, 7]
        assert seen[..., -1].add(seen[..., 5]).sum(-1).tolist() == [[10, 10], [25, 25]]  # tokens of these documents


@pytest.mark.parametrize(("ring", "layout"), [(2, "zigzag"), (3, "contiguous")])
@pytest.mark.parametrize("packed", [False, True])
def test_ranks_assign_as_one_device(ring: int, layout: str, packed: bool) -> None:
    (_, k, _), *_ = qkv(length=48)
    k, ids = k.detach(), direct.random_documents(2, 48, torch.Generator().manual_seed(2)) if packed else None
    known = torch.zeros(2, 48, dtype=torch.int64) if ids is None else ids
    start = clusters.empty(k, SLOTS), torch.tensor([-1, -1])
    index, expected, last = positions(known), *clusters.follow(k, positions(known), known, *start)[:2]
    here = [torch.tensor(own) for own in global_indices(layout, ring, 48)]

    def worker(link: Link) -> tuple[torch.Tensor, torch.Tensor]:
        own = here[link.rank]
        local = locate(
            len(own), 2, k.device, mesh=None, layout=layout, document_ids=None if ids is None else ids[:, own],
            length=None, link=link,
        )  # fmt: skip
        return clusters.over_ranks(k[:, :, own], index[:, own], local, *start, True)

    found, _ = simulate.run(ring, worker)
    assert torch.cat([slot for slot, _ in found], 2)[:, :, torch.cat(here).argsort()].equal(expected)
    assert all(seen.equal(last) for _, seen in found)


def blobs() -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Return keys (1, 1, 200, 6) around four distant centers, and the center of each."""
    g = torch.Generator().manual_seed(0)
    centers = 20 * torch.randn(1, 1, 4, 6, generator=g, dtype=torch.float64)
    truth = torch.cat([torch.arange(4), torch.randint(0, 4, (196,), generator=g)])
    return centers[:, :, truth] + torch.randn(1, 1, 200, 6, generator=g, dtype=torch.float64), truth, g


def test_tokens_near_each_other_share_a_slot() -> None:
    k, truth, _ = blobs()
    nothing = torch.zeros(1, 200, dtype=torch.int64)
    online, *_ = clusters.follow(k, torch.arange(200)[None], nothing, clusters.empty(k, 4), nothing[:, 0])
    assert online[0, 0].equal(truth)


def test_slots_over_all_tokens_are_the_means_of_clusters() -> None:
    k, _, g = blobs()
    slot = clusters.assign(k, torch.zeros(1, 200, dtype=torch.int64), 4, 10)[0, 0]
    q, v = torch.randn(1, 1, 200, 6, generator=g, dtype=torch.float64), k * 2
    members = (slot[:, None] == torch.arange(4)).double()
    means = members.T @ k[0, 0] / members.sum(0)[:, None].clamp_min(1)
    logits = (0.1 * q[0, 0] @ means.T).masked_fill(members.sum(0) == 0, -torch.inf)
    ours = abc_attention(q, k, v, control.cluster(4, 10), causal=False, scale=0.1)
    assert direct.differences([ours[0, 0]], [logits.softmax(-1) @ (2 * means)])[0] <= tolerance("fp64")


def test_causal_clusters_see_no_later_token() -> None:
    k, _, g = blobs()
    q, v, changed = torch.randn(1, 1, 200, 6, generator=g, dtype=torch.float64), k * 2, k.clone()
    changed[:, :, 150:] = 0.0
    before, after = (abc_attention(q, x, v, control.cluster(4)) for x in (k, changed))
    assert before[:, :, :150].equal(after[:, :, :150])

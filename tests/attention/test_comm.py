"""Packets, messages and counters, and the link of a process that sends to itself."""

from __future__ import annotations

from dataclasses import asdict

import torch

from longctx.attention.comm import (
    GRADIENT,
    HOME,
    KV,
    STATE,
    Counters,
    LocalLink,
    LoopbackLink,
    Message,
    Packet,
    count,
    counters,
)  # fmt: skip


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k, v in bf16 and document ids in int64."""
    k = torch.randn(1, 2, 3, 5).bfloat16()
    return k, torch.randn(1, 2, 3, 4).bfloat16(), torch.arange(3)[None]


def test_a_packet_is_views_of_one_buffer_aligned_for_their_dtypes() -> None:
    like = tensors()
    packet = Packet((*like, None))
    assert packet.parts[3] is None and packet.buffer.numel() == sum(x.numel() * x.element_size() for x in like)
    for part, x in zip(packet.parts, like, strict=False):
        assert part is not None and part.shape == x.shape and part.dtype == x.dtype
        assert part.storage_offset() * part.element_size() % part.element_size() == 0
        assert part.untyped_storage().data_ptr() == packet.buffer.untyped_storage().data_ptr()
        part.copy_(x)
    assert all(torch.equal(a, b) for a, b in zip(packet.parts, like, strict=False) if a is not None)
    same = Packet((like[0], like[0]), torch.float32)  # one tensor twice: two parts
    dk, dv = same.gradients()
    assert dk.dtype == dv.dtype == torch.float32 and dk.data_ptr() != dv.data_ptr()


def test_packets_add_part_by_part() -> None:
    a, b = Packet(tensors()[:2], torch.float32), Packet(tensors()[:2], torch.float32)
    for packet, value in ((a, 1.5), (b, 2.0)):
        for x in packet.gradients():
            x.fill_(value)
    a.add_(b)
    assert all(bool((x == 3.5).all()) for x in a.gradients())


def test_a_lent_packet_is_the_callers_tensors_in_pieces() -> None:
    k, v, _ = tensors()
    packet = Packet.lend((k, v.transpose(2, 3), None))
    assert packet.parts[0] is k and packet.parts[2] is None
    pieces = Message(1, packet, KV, in_pieces=True).tensors
    assert len(pieces) == 2 and pieces[1].is_contiguous() and torch.equal(pieces[1], v.transpose(2, 3))


def test_counters() -> None:
    book, (k, v, ids) = Counters(), tensors()
    block, gradient = Packet((k, v, ids)), Packet((k, v), torch.float32)
    sends = [Message(1, block, KV), Message(1, gradient, GRADIENT), Message(2, gradient, HOME)]
    count([*sends, Message(1, Packet((ids,)), STATE)], book)
    kv, ids_bytes, grads = 2 * (k.numel() + v.numel()), 8 * ids.numel(), 4 * (k.numel() + v.numel())
    assert asdict(book) == {
        "hops": 1, "gradient_hops": 2, "messages": 4, "bytes": kv + 2 * ids_bytes + 2 * grads, "kv_bytes": kv,
        "gradient_bytes": 2 * grads, "document_bytes": ids_bytes, "state_bytes": ids_bytes, "exchanges": 0,
        "exchange_bytes": 0,
    }  # fmt: skip
    book.reset()
    assert not any(asdict(book).values())


def test_loopback_receives_what_it_sends() -> None:
    k, v, ids = tensors()
    sent, arriving = Packet.lend((k, v, ids)), Packet((k, v, ids))
    before = counters.hops
    link = LoopbackLink(3)
    link.exchange([Message(1, sent, KV, True)], [Message(2, arriving, KV, True)]).wait()
    assert all(torch.equal(a, b) for a, b in zip(arriving.parts, (k, v, ids), strict=True) if a is not None)
    assert counters.hops == before + 1
    LocalLink().exchange([], []).wait()

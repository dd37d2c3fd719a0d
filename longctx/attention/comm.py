"""Send blocks between ranks: messages are posted before the computation that hides them, and waited for after it.

A `Packet` holds several tensors (keys, values, document ids; or dK and dV). A block's first hop sends the caller's own
tensors, one message each; every later hop is one message from one buffer. A `Link` posts the messages of one stage and
returns what to wait for. On CUDA, messages run on a side stream, ordered with the compute stream by events alone (no
host synchronisation), and every tensor is recorded on the streams that use it; this path has run in one process
(`LoopbackLink`) only, not on several GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from longctx.mesh import Mesh


@dataclass
class Counters:
    """What this process has sent on rings and within ulysses groups since the last reset()."""

    hops: int = 0
    """Blocks of keys and values (with their document ids) sent to a neighbour."""
    gradient_hops: int = 0
    """Blocks of dK and dV sent to a neighbour or home."""
    messages: int = 0
    bytes: int = 0
    kv_bytes: int = 0
    gradient_bytes: int = 0
    document_bytes: int = 0
    state_bytes: int = 0
    """Of bounded layers' states and their gradients; part of `bytes`."""
    exchanges: int = 0
    """All-to-alls within a ulysses group, of tokens for heads or back."""
    exchange_bytes: int = 0
    """What these all-to-alls sent from this rank; part of `bytes`."""

    def reset(self) -> None:
        for field in fields(self):
            setattr(self, field.name, 0)


counters = Counters()
"""This process's counters; tests and metrics read them."""

KV, GRADIENT, HOME, STATE = 0, 1, 2, 3
"""Kinds of messages; several may be in transit between one pair of ranks."""


class Packet:
    """Tensors that travel together: views of one buffer, sent as one message; or, when a block leaves its home, the
    caller's own tensors (`lend`), sent as 2 or 3 messages, which costs less than copying them into one buffer.

    parts: k (B, G, T, Dk), v (B, G, T, Dv), document ids (B, T) or None; or dK, dV in the accumulator's dtype.
    """

    def __init__(self, like: Iterable[torch.Tensor | None], dtype: torch.dtype | None = None) -> None:
        """Allocate uninitialised tensors with the shapes, dtypes (unless `dtype` is given) and device of `like`. None
        stays None."""
        like = list(like)
        given = [index for index, x in enumerate(like) if x is not None]  # not by tensor: k and v may be one
        dtypes = {index: dtype or like[index].dtype for index in given}  # type: ignore[union-attr]
        sizes = {index: like[index].numel() * dtypes[index].itemsize for index in given}  # type: ignore[union-attr]
        device = like[given[0]].device  # type: ignore[union-attr]
        self.buffer = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=device)
        views, offset = {}, 0
        for index in sorted(given, key=lambda index: -dtypes[index].itemsize):  # widest first: all views are aligned
            view = self.buffer[offset : offset + sizes[index]].view(dtypes[index])
            views[index] = view.view(like[index].shape)  # type: ignore[union-attr]
            offset += sizes[index]
        self.parts: tuple[torch.Tensor | None, ...] = tuple(views.get(index) for index in range(len(like)))

    @classmethod
    def lend(cls, tensors: Iterable[torch.Tensor | None]) -> Packet:
        """Return a packet of the caller's own tensors (copied only if not contiguous), to be sent in pieces."""
        packet = cls.__new__(cls)
        packet.parts = tuple(None if x is None else x.contiguous() for x in tensors)
        return packet

    def add_(self, other: Packet) -> None:
        """Add a packet of the same shapes."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            if mine is not None and theirs is not None:
                mine.add_(theirs)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (dK, dV) of a packet that holds them."""
        dk, dv = self.parts
        assert dk is not None and dv is not None
        return dk, dv


class Message(NamedTuple):
    """One packet to or from a ring rank."""

    peer: int
    packet: Packet
    kind: int
    in_pieces: bool = False

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors to send or receive, in the same order at both ends."""
        return [x for x in self.packet.parts if x is not None] if self.in_pieces else [self.packet.buffer]


class Pending(Protocol):
    """Messages in transit."""

    def wait(self) -> None:
        """Wait (the current stream does) until received tensors may be read and sent ones overwritten."""


class Link(Protocol):
    """This rank's end of a ring."""

    ring: int
    rank: int

    def exchange(self, sends: list[Message], receives: list[Message]) -> Pending:
        """Post all messages of one stage."""


def count(sends: list[Message], counters: Counters = counters) -> None:
    """Count what is about to be sent."""
    for message in sends:
        nbytes = sum(x.numel() * x.element_size() for x in message.tensors)
        counters.messages += len(message.tensors)
        counters.bytes += nbytes
        if message.kind == KV:
            counters.hops += 1
            documents = message.packet.parts[2]
            ids = 0 if documents is None else documents.numel() * documents.element_size()
            counters.document_bytes += ids
            counters.kv_bytes += nbytes - ids
        elif message.kind == STATE:
            counters.state_bytes += nbytes
        else:
            counters.gradient_hops += 1
            counters.gradient_bytes += nbytes


class _Done:
    def wait(self) -> None:
        pass


class LocalLink:
    """A ring of one rank: nothing is sent."""

    ring, rank = 1, 0

    def exchange(self, sends: list[Message], receives: list[Message]) -> Pending:
        assert not sends and not receives
        return _Done()


class ProcessLink:
    """A ring of processes, over the mesh's ring communicator."""

    def __init__(self, mesh: Mesh) -> None:
        self.ring, self.rank = mesh.ring_size, mesh.ring_rank
        self._group, self._ranks = mesh.ring_group, mesh.ring_ranks

    def exchange(self, sends: list[Message], receives: list[Message]) -> Pending:
        if not sends and not receives:
            return _Done()
        count(sends)
        # NCCL matches the messages between two ranks by order: every rank posts receives first, then sends, by kind.
        sends, receives = (sorted(messages, key=lambda message: message.kind) for messages in (sends, receives))
        with _side_stream(sends, receives) as done:
            operations = [self._operations(dist.irecv, m) for m in receives]
            operations += [self._operations(dist.isend, m) for m in sends]
            done.works = dist.batch_isend_irecv([operation for some in operations for operation in some])
        return done

    def _operations(self, call: Callable[..., Any], message: Message) -> list[dist.P2POp]:
        peer = self._ranks[message.peer]
        return [dist.P2POp(call, x, peer, self._group, 8 * message.kind + i) for i, x in enumerate(message.tensors)]


class LoopbackLink:
    """A simulated ring in one process: each message that it sends is the message that it receives.

    The result is that of a ring whose ranks all hold the same local tensors. It runs the whole path (packets, stages,
    side stream and events) on one device.
    """

    def __init__(self, ring: int, rank: int = 0) -> None:
        self.ring, self.rank = ring, rank

    def exchange(self, sends: list[Message], receives: list[Message]) -> Pending:
        if not receives:
            return _Done()
        count(sends)
        by_kind = {KV if m.kind == KV else GRADIENT: m for m in sends}  # in a closed ring, home is the next rank
        with _side_stream(sends, receives) as done:
            for message in receives:
                sent = by_kind[KV if message.kind == KV else GRADIENT]
                for theirs, ours in zip(sent.tensors, message.tensors, strict=True):
                    ours.copy_(theirs)
        return done


_streams: dict[torch.device, torch.cuda.Stream] = {}


class _side_stream:
    """Run the body on the device's communication stream, after the work queued on the compute stream."""

    def __init__(self, sends: list[Message], receives: list[Message]) -> None:
        self._buffers = [x for m in (*sends, *receives) for x in m.tensors]
        self.works: list[dist.Work] = []
        self._stream: torch.cuda.Stream | None = None
        if self._buffers[0].is_cuda:
            device = self._buffers[0].device
            self._stream = _streams.setdefault(device, torch.cuda.Stream(device))

    def __enter__(self) -> _side_stream:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            for buffer in self._buffers:  # the allocator must not reuse them while the side stream does
                buffer.record_stream(self._stream)
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._context.__exit__(*error)

    def wait(self) -> None:
        if self._stream is None:
            for work in self.works:
                work.wait()
            return
        with torch.cuda.stream(self._stream):
            for work in self.works:  # NCCL: makes the side stream wait, not the host
                work.wait()
            done = self._stream.record_event()
        torch.cuda.current_stream().wait_event(done)

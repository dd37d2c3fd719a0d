"""Locate a call's local tokens in the sequence: the ring and rank, their global indices, their documents.

A stretch is a run of consecutive tokens of the sequence on one rank: one per rank if contiguous, two with zigzag.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from longctx.attention.comm import Link, LocalLink, ProcessLink
from longctx.bounded.chunks import Runs
from longctx.bounded.ranks import monoid
from longctx.bounded.ranks.exchange import StretchMap
from longctx.bounded.ranks.scan import associative_exclusive_scan, map_stretches
from longctx.errors import AttentionError
from longctx.layout import Layout, get_layout
from longctx.mesh import Mesh


@dataclass(frozen=True)
class LocalTokens:
    """The local tokens of one call.

    stretches: which rank holds which stretches.
    parts: the contiguous stretches held here, as slices of the local tokens, beside `stretches.by_rank[link.rank]`.
    index: (T,) int64, global indices.
    ids: (B, T) int64, documents with -1 at padding; None for one document without padding.
    """

    link: Link
    stretches: StretchMap
    parts: tuple[slice, ...]
    index: torch.Tensor
    ids: torch.Tensor | None

    @property
    def valid(self) -> torch.Tensor | None:
        """(B, T) bool: not padding."""
        return None if self.ids is None else self.ids >= 0

    def ids_of(self, here: slice) -> torch.Tensor | None:
        """Return the documents of a stretch."""
        return None if self.ids is None else self.ids[:, here]

    def tail(self, here: slice, batch: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the tokens of a stretch's last document, (B, T) bool or None for all, and that document (B,) in the
        notation of monoid.py."""
        if self.ids is None:
            return None, self.index.new_zeros(batch)
        runs = Runs(self.ids[:, here], None)
        return runs.tail(), runs.ending

    def document_before(self, document: torch.Tensor | None, batch: int) -> torch.Tensor:
        """Return the document (B,) of a state before the sequence; without ids all tokens continue it, as 0."""
        return self.index.new_zeros(batch) if self.ids is None or document is None else document

    def counts(
        self, count: torch.Tensor | None, document: torch.Tensor | None, total: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the tokens of each token's document up to and including it, over all ranks.

        Args:
            count, document: (B,) each, of the state before the first token of the sequence.

        Returns:
            (B or 1, T) int64; and (B or 1,) the count of the sequence's last document, on a ring only if `total`, else
            that of this rank's last token.
        """
        if self.ids is None:
            # One document without padding: the last token counts all ranks' tokens.
            found, last = self.index[None] + 1, self.index.new_full((1,), self.link.ring * len(self.index))
            return (found, last) if count is None else (found + count[:, None], last + count)
        here = [Runs(self.ids[:, part], None) for part in self.parts]
        starts = [(count, document)]
        if self.link.ring > 1:
            ends = [(run.tail().sum(1), run.ending) for run in here]
            starts = associative_exclusive_scan(  # type: ignore[assignment]
                ends, monoid.add, monoid.identity(ends[0]), self.link, self.stretches, total=total
            )
            if count is not None and document is not None:
                starts = [monoid.add((count, document), start) for start in starts]  # type: ignore[misc,arg-type]
            starts = [(done, monoid.name(before)) for done, before in starts]  # type: ignore[arg-type]
        pieces = [
            Runs(self.ids[:, part], before).counts(done)
            for part, (done, before) in zip(self.parts, starts, strict=False)
        ]
        found = torch.cat(pieces, 1)
        whole = starts[-1][0] if total and self.link.ring > 1 else None
        return found, found[:, -1] if whole is None else whole


_SEVERAL = -2  # in `only_document` alone; monoid.begun(0), the same number, never meets it


def has_several(ids: torch.Tensor) -> torch.Tensor:
    """Return whether each row of ids (B, T) holds more than one document: (B,) bool. Padding (-1) is none."""
    return ((ids >= 0) & (ids != ids.amax(1, keepdim=True))).any(1)


def only_document(ids: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
    """Return the one document (B,) of each row: -1 if it has none, -2 if it has several."""
    if ids is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    return ids.amax(1).clamp_min(-1).masked_fill(has_several(ids), _SEVERAL)


def check_one_document(documents: list[torch.Tensor]) -> None:
    """Check all ranks' `only_document`, so that either all ranks raise or none does.

    Raises:
        AttentionError: a row holds several documents.
    """
    found = torch.stack(documents)
    top = found.amax(0)
    if bool(((found == _SEVERAL) | ((found >= 0) & (found != top))).any()):
        raise AttentionError(
            "packed documents without causal have one state per document: no single state can be returned, and in "
            "cross attention the document of a query is unknown"
        )


def locate(
    tokens: int,
    batch: int,
    device: torch.device,
    *,
    mesh: Mesh | None,
    layout: str | Layout,
    document_ids: torch.Tensor | None,
    length: int | None,
    link: Link | None = None,
) -> LocalTokens:
    """Locate `tokens` local tokens of a sequence sharded in `layout` over the mesh's ring.

    Raises:
        AttentionError: the mesh splits heads, the layout interleaves tokens, or the length does not fit.
    """
    if mesh is not None and mesh.ulysses_size > 1:
        raise AttentionError(
            f"a mesh with ulysses={mesh.ulysses_size}: splitting heads is not supported in this version; use "
            f"Mesh(ring={mesh.sequence_size})"
        )
    if link is None:
        link = LocalLink() if mesh is None or mesh.ring_size == 1 else ProcessLink(mesh)
    layout = get_layout(layout)
    stretches = map_stretches(layout, link.ring)
    padded = tokens * link.ring
    if padded % layout.multiple(link.ring) and link.ring > 1:
        raise AttentionError(
            f"{tokens} tokens per rank over a ring of {link.ring} make {padded}, and layout {layout.name!r} needs a "
            f"multiple of {layout.multiple(link.ring)}; pad with longctx.shard"
        )
    if length is not None and not 0 < length <= padded:
        raise AttentionError(
            f"length={length}: the ring holds {padded} tokens; give the true global length, 1 to {padded}"
        )
    spans = layout.spans(link.rank, link.ring, padded) if link.ring > 1 else None
    pieces = [torch.arange(tokens)] if spans is None else [torch.arange(s.start, s.last + 1) for s in spans]
    ends = accumulate(len(piece) for piece in pieces)
    parts = tuple(slice(end - len(piece), end) for end, piece in zip(ends, pieces, strict=True))
    index = torch.cat(pieces).to(device)
    if document_ids is not None:
        document_ids = document_ids.to(torch.int64)
    if length is not None and length < padded:
        if document_ids is None:
            document_ids = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
        document_ids = document_ids.masked_fill(index >= length, -1)
    return LocalTokens(link, stretches, parts, index, document_ids)

"""Print packed rows: documents in colours, where they begin, how full the row is, which rank holds which tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from longctx.data.pack import Pieces
from longctx.data.rows import PackedRows
from longctx.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from longctx.data.tokens.file import TokenFile, TokenStore
from longctx.errors import DataError
from longctx.layout import Layout, get_layout

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red", "bright_cyan", "bright_yellow", "bright_green")
_EXCERPT_TOKENS = 24


def inspect(
    file: str | Path | TokenStore,
    sample: int = 0,
    *,
    sequence_length: int = 8192,
    packing: str = "best_fit",
    ring: int = 2,
    ulysses: int = 1,
    layout: str | Layout = "zigzag",
    tokenizer: Tokenizer | str | Path | None = None,
    verify: bool = True,
    console: Console | None = None,
) -> None:
    """Print the contents of a token file and one packed row of it.

    Args:
        file: token file.
        sample: number of the row, in file order.
        sequence_length, packing, ring, ulysses, layout: those of the run.
        tokenizer: to show text; None takes the folder ``tokenizer`` beside the file, if there.
        verify: read the whole file first (checksum, index, token range).

    Raises:
        DataError: damaged file, no such row, or a tokenizer that did not write it.
    """
    store = file if isinstance(file, TokenStore) else TokenFile(file)
    if verify:
        store.verify() if isinstance(store, TokenFile) else store.check_tokens()
    rows = PackedRows(store, sequence_length, packing)
    if not 0 <= sample < len(rows):
        raise DataError(f"{store.path}: sample {sample} does not exist; choose 0 to {len(rows) - 1}")
    chosen = get_layout(layout)
    words = _tokenizer(store, tokenizer)
    console = console or Console()
    console.print(
        Group(
            _summary(store, rows, verify),
            _shards(rows, sample, chosen, ring, ulysses, max(min(console.width - 14, 96), 16)),
            _documents(store, rows.pieces(sample)[1], words),
        )
    )


def _tokenizer(store: TokenStore, given: Tokenizer | str | Path | None) -> Tokenizer | None:
    beside = store.path.parent / "tokenizer"
    if given is None and not (beside / "tokenizer.json").is_file():
        return None
    loaded = given if isinstance(given, Tokenizer) else load_tokenizer(given or beside)
    if given is None and store.tokenizer_hash not in (None, loaded.hash):
        return None
    store.require_tokenizer(loaded.hash)
    return loaded


def _summary(store: TokenStore, rows: PackedRows, verified: bool) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    lengths = np.diff(store.offsets)
    middle = int(np.median(lengths))
    for name, value in (
        ("file", str(store.path)),
        ("checksum", f"{store.identity[:16]} {'verified' if verified else 'not verified'}"),
        ("tokenizer", (store.tokenizer_hash or "not recorded")[:16]),
        ("vocabulary", f"{store.vocabulary_size:,} ({store.tokens.dtype})"),
        ("tokens", f"{store.token_count:,} in {store.document_count:,} documents"),
        ("ignored", f"{store.ignored_tokens:,} of the tokens, by the loss"),
        ("documents", f"{lengths.min():,} to {lengths.max():,} tokens, median {middle:,}"),
        ("rows", f"{len(rows):,} of {rows.sequence_length:,} tokens, {rows.packing}, {rows.fill:.2%} full"),
    ):
        table.add_row(Text(name, style="bold"), Text(value))
    return Panel(table, title="token file")


def _shards(rows: PackedRows, sample: int, layout: Layout, ring: int, ulysses: int, most: int) -> RenderableType:
    """Yield one bar for the row and one per rank; each character is a slice of the padded row."""
    padded = layout.padded_length(rows.sequence_length, ring, ulysses)
    width = min(padded, most)
    document_ids = rows.read(sample, np.arange(padded, dtype=np.int64)).document_ids
    edges = np.arange(width) * padded // width
    table = Table.grid(padding=(0, 1))
    table.add_row(Text("row", style="bold"), _bar(document_ids[edges]))
    for rank in range(ring * ulysses):
        held = np.zeros(padded, dtype=bool)
        for span in layout.member_spans(rank // ulysses, ring, rank % ulysses, ulysses, padded):
            held[span.start : span.last + 1 : span.stride] = True
        share = np.add.reduceat(held.astype(np.int64), edges) * ring * ulysses / (padded / width)
        table.add_row(Text(f"rank {rank}", style="bold"), _bar(document_ids[edges], share > 0.5))
    starts = (np.flatnonzero(np.diff(document_ids)) + 1).tolist()
    caption = f"{len(starts)} borders at {', '.join(map(str, starts[:12]))}{' …' if len(starts) > 12 else ''}"
    local = padded // (ring * ulysses)
    title = f"row {sample}: {layout.name}, ring {ring} x ulysses {ulysses}, {local:,} tokens per rank"
    return Panel(Group(table, Text(caption, style="dim")), title=title)


def _bar(document_ids: np.ndarray, shown: np.ndarray | None = None) -> Text:
    bar = Text()
    for index, document in enumerate(document_ids.tolist()):
        if shown is not None and not shown[index]:
            bar.append(" ")
        else:
            bar.append("·" if document < 0 else "█", style="dim" if document < 0 else _colour(document))
    return bar


def _colour(document: int) -> str:
    return _COLOURS[document % len(_COLOURS)]


def _documents(store: TokenStore, pieces: Pieces, words: Tokenizer | None) -> RenderableType:
    table = Table(title=f"{pieces.lengths.size} documents, {pieces.fill:,} tokens", title_justify="left")
    for name in ("id", "positions", "tokens", "cut", "document", "begins with"):
        table.add_column(name, overflow="fold" if name == "begins with" else "ellipsis", justify="left")
    begin = 0
    for number, (start, length, document) in enumerate(zip(*(array.tolist() for array in pieces), strict=True)):
        ids = store.tokens[start : start + min(length, _EXCERPT_TOKENS)]
        excerpt = repr(words.decode(ids))[1:-1] if words else " ".join(map(str, ids.tolist()))
        cut_before = start > int(store.offsets[document])
        cut_after = start + length < int(store.offsets[document + 1])
        cut = {(False, False): "whole", (False, True): "end", (True, False): "begin", (True, True): "both"}
        table.add_row(
            Text(str(number), style=_colour(number)),
            f"{begin}-{begin + length - 1}",
            f"{length:,}",
            cut[cut_before, cut_after],
            Text(store.name(document)),
            Text(excerpt, style=_colour(number)),
        )
        begin += length
    return table

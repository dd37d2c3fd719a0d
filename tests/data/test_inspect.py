"""What a person sees of a packed row: documents, borders, fill, and who holds what."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from longctx.data.build import build_tokens
from longctx.data.inspect import inspect
from longctx.data.tokens.file import TokenFile
from longctx.errors import DataError


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "text").mkdir()
    for number, size in enumerate((30, 60, 20, 200)):
        (folder / "text" / f"{number}.txt").write_text(f"{number}[b]x" * (size // 6))
    build_tokens(folder / "text", "bytes", folder, held_out=0)
    return folder / "train.tokens"


def shown(tokens: Path | TokenFile, colour: bool = False, width: int = 150, **options: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=colour, color_system="standard" if colour else None)
    inspect(tokens, console=console, **{"sequence_length": 128, **options})
    return stream.getvalue()


def test_a_packed_row(tokens: Path) -> None:
    text = shown(tokens, sample=0)
    for words in ("verified", "257 (uint16)", "4 documents", "best_fit", "3 documents, 115 tokens"):
        assert words in text
    assert "3 borders at 26, 77, 115" in text  # the last: where padding begins
    assert "0.txt" in text and "0[b]x0[b]x" in text  # markup of the text is not obeyed
    assert all(words in text for words in ("whole", "begin", "3.txt"))


def test_shards_of_a_ring(tokens: Path) -> None:
    text = shown(tokens, sample=0, ring=4)
    bars = {line.split()[1] + line.split()[2]: line for line in text.splitlines() if "│ rank " in line}
    held = {name: line.count("█") + line.count("·") for name, line in bars.items()}
    assert held == {f"rank{rank}": 24 for rank in range(4)}  # a quarter of 96 characters each
    assert "zigzag, ring 4 x ulysses 1, 32 tokens per rank" in text
    assert shown(tokens, ring=2, ulysses=2, layout="striped").count("│ rank ") == 4


def test_bars_fit_a_narrow_terminal(tokens: Path) -> None:
    lines = shown(tokens, width=50, ring=4).splitlines()
    assert max(map(len, lines)) <= 50 and sum("│ rank " in line for line in lines) == 4
    assert not any("…" in line for line in lines if "█" in line)


def test_documents_have_colours(tokens: Path) -> None:
    text = shown(tokens, colour=True, sample=0)
    assert all(f"\x1b[{code}m" in text for code in (36, 33, 32))


def test_cut_documents_are_marked(tokens: Path) -> None:
    assert "both" in shown(tokens, sample=2, packing="concat", sequence_length=80)


def test_without_a_tokenizer_ids_are_shown(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tokens").write_bytes(tokens.read_bytes())
    assert "48 91 98 93 120 48" in shown(tmp_path / "x.tokens")
    assert "0[b]x" in shown(tmp_path / "x.tokens", tokenizer="bytes")


def test_errors(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample 99 does not exist; choose 0 to"):
        shown(tokens, sample=99)
    raw = bytearray(tokens.read_bytes())
    raw[300] ^= 1
    (tmp_path / "x.tokens").write_bytes(raw)
    with pytest.raises(DataError, match="checksum of its content is wrong"):
        shown(tmp_path / "x.tokens")
    assert "not verified" in shown(tmp_path / "x.tokens", verify=False)

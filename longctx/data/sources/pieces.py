"""Split long texts into pieces, so that no step of a build needs memory for a whole document.

A piece ends before a space between two words, where byte-level BPEs (GPT-2, Llama 3, Qwen …) and SentencePiece begin a
token anyway, so that the tokens of the pieces equal those of the whole text. If there is no such space, a piece ends
before any other space or a line end; if there is none of these, anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECE_CHARACTERS = 2**18
_SEARCHED = 2**15  # characters at the end of a piece that are searched for a good split


def pieces(chunks: Iterable[str], longest: int = 0) -> Iterator[str]:
    """Yield a text in pieces that depend on the text alone, not on the chunks.

    Args:
        chunks: the text, in parts of any length.
        longest: characters of a piece at most; 0 for ``PIECE_CHARACTERS``.
    """
    longest = longest or PIECE_CHARACTERS
    rest = ""
    for chunk in chunks:
        rest, begin = rest + chunk, 0
        while len(rest) - begin > longest:
            end = _end(rest, begin, begin + longest)
            yield rest[begin:end]
            begin = end
        rest = rest[begin:]
    if rest:
        yield rest


def _end(text: str, begin: int, limit: int) -> int:
    """Return where a piece that begins at ``begin`` ends, at most at ``limit``; ``text`` continues after it."""
    first, fair = max(begin, limit - _SEARCHED) + 1, 0
    place = text.rfind(" ", first, limit)
    while place > begin:
        before, after = text[place - 1], text[place + 1]
        if before.isalnum() and after.isalnum():
            return place
        if not (fair or before.isspace() or after.isspace()):
            fair = place
        place = text.rfind(" ", first, place)
    end = text.rfind("\n", begin + 1, limit)
    while end > begin and text[end - 1].isspace():  # a run of white space stays whole
        end -= 1
    return fair or (end if end > begin else limit)

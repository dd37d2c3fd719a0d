"""Read a tokenizer.json as plain data: its path, its number of ids, and limits checked before the tokenizer is built.

A tokenizer.json is untrusted input. An id of 2^31 would require an embedding of as many rows, and a regular expression
can take exponential time on one line of text, so both are checked first. No torch, no `tokenizers`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longctx.errors import DataError

NAME = "tokenizer.json"
LARGEST_ID = 2**24 - 1
_LARGEST_FILE = 256 * 2**20
_LONGEST_PATTERN = 2**14
_MOST_REPEATS = 10**5
_POINTER = b"version https://git-lfs.github.com/spec/"
_SLOW_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_BOUNDED = re.compile(r"\{(\d*)(,?)(\d*)\}")


def tokenizer_file(source: str | Path) -> Path:
    """Return the tokenizer.json that ``source`` names: the file itself, or the one in a folder.

    Raises:
        DataError: there is none; a tokenizer of another format is named, with how to convert it.
    """
    path = Path(source)
    folder: Path | None = path.parent if path.name in _SLOW_FILES else None
    try:
        if path.is_dir():
            folder, path = path, path / NAME
        other = [name for name in _SLOW_FILES if folder is not None and (folder / name).is_file()]
        if path.is_file() and path.name not in _SLOW_FILES:
            return path
    except OSError:  # a name that is too long, say
        other = []
    if other:
        raise DataError(
            f"{path.parent} holds {other[0]}, but no {NAME}; convert it once: "
            f"transformers.AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained({str(path.parent)!r})"
        )
    raise DataError(
        f"{path}: no tokenizer there; give 'bytes', a {NAME}, or a folder with one (transformers' `save_pretrained` "
        "writes it for fast tokenizers)"
    )


def read_tokenizer_file(path: Path) -> dict[str, Any]:
    """Return the content of a tokenizer.json after checking its limits.

    Raises:
        DataError: it cannot be read, is a Git LFS pointer, no tokenizer.json, or beyond the limits.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise DataError(f"{path} is larger than {_LARGEST_FILE:,} bytes, so it is no {NAME}")
        raw = path.read_bytes()
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror}") from None
    if raw.startswith(_POINTER):
        raise DataError(f"{path} is a Git LFS pointer, not the tokenizer; fetch it: git lfs pull")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path}: not a {NAME} ({type(problem).__name__}: {problem})") from None
    require_bounds(content, path)
    assert isinstance(content, dict)
    vocabulary_size_in(path.parent, content)
    return content


def require_bounds(content: Any, path: Path) -> None:
    """Reject ids beyond any vocabulary, and regular expressions that may not terminate.

    Raises:
        DataError: beyond the limits, or not the content of a tokenizer.json.
    """
    try:
        largest = vocabulary_size_of(content) - 1
        negative = any(index < 0 for index in _ids(content))
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise DataError(f"{path}: not a {NAME} ({type(problem).__name__}: {problem})") from None
    if largest > LARGEST_ID or negative:
        what = "a negative id" if negative else f"the id {largest:,}, above {LARGEST_ID:,}"
        raise DataError(f"{path}: has {what}; no vocabulary is so large: correct the file")
    for pattern in _patterns(content):
        wrong = endless(pattern)
        if wrong:
            shown = pattern if len(pattern) <= 60 else pattern[:59] + "…"
            raise DataError(f"{path}: the regular expression {shown!r} {wrong}; write it without")


def vocabulary_size_of(content: dict[str, Any]) -> int:
    """Return one above the largest id of a tokenizer.json."""
    return max(_ids(content), default=-1) + 1


def vocabulary_size_in(folder: Path, content: dict[str, Any]) -> int:
    """Return one above the largest id of the tokenizer that transformers builds from a folder.

    Its tokenizer_config.json may add tokens to ``content``, that of tokenizer.json: by id, or by naming special tokens
    that have none, which get the next ones.

    Raises:
        DataError: tokenizer_config.json is not JSON, or adds ids beyond the limits.
    """
    path, size = folder / "tokenizer_config.json", vocabulary_size_of(content)
    if not path.is_file():
        return size
    try:
        settings = json.loads(path.read_bytes())
        added = settings.get("added_tokens_decoder") or {}
        ids = [int(index) for index in added]
        names = {_written(settings.get(f"{role}_token")) for role in _ROLES} | {_written(it) for it in added.values()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as problem:
        reason = f"{type(problem).__name__}: {problem}"
        raise DataError(f"{path} cannot be read ({reason}); save the tokenizer again") from None
    if ids and (max(ids) > LARGEST_ID or min(ids) < 0):
        raise DataError(f"{path}: adds the id {max(ids, key=abs):,}; no vocabulary is so large: correct the file")
    vocabulary = content["model"]["vocab"]
    known = set(vocabulary) if isinstance(vocabulary, dict) else {piece[0] for piece in vocabulary}
    known |= {token.get("content") for token in content.get("added_tokens") or []}
    known |= {_written(it) for it in added.values()}
    return max(size, max(ids, default=-1) + 1) + len({name for name in names if name} - known)


def _written(token: Any) -> str | None:
    """Return a token as tokenizer_config.json writes it: a text, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def endless(pattern: str) -> str | None:
    """Return why matching ``pattern`` may take unbounded time or memory, or None.

    Detected: an unbounded repetition of a group that has an unbounded repetition itself, which backtracks
    exponentially; nested counted repetitions that expand to more than 10^5 copies.
    """
    if len(pattern) > _LONGEST_PATTERN:
        return f"has {len(pattern):,} characters, more than {_LONGEST_PATTERN:,}"
    groups: list[tuple[bool, int]] = []  # per open group: contains an unbounded repetition; the most copies inside
    unbounded, copies, index = False, 1, 0
    while index < len(pattern):
        index, closed = _atom(pattern, index)
        inner_unbounded, inner_copies = False, 1
        if closed == "(":
            groups.append((unbounded, copies))
            unbounded, copies = False, 1
            continue
        if closed == ")" and groups:
            inner_unbounded, inner_copies = unbounded, copies
            unbounded, copies = groups.pop()
        index, most = _quantifier(pattern, index)
        if most is None and inner_unbounded:
            return "repeats a group without bound that repeats a part of itself without bound"
        unbounded = unbounded or inner_unbounded or most is None
        copies = max(copies, inner_copies * (most or 1))
        if copies > _MOST_REPEATS:
            return f"repeats a part of itself more than {_MOST_REPEATS:,} times"
    return None


def _atom(pattern: str, index: int) -> tuple[int, str]:
    """Return the position after the atom at ``index``, and "(" or ")" if it opens or closes a group."""
    sign = pattern[index]
    if sign == "\\":
        escape = re.compile(r"\\[pP]\{[^}]*\}|\\.", re.DOTALL).match(pattern, index)
        return (escape.end() if escape else index + 1), ""
    if sign == "[":
        return _behind_class(pattern, index), ""
    if sign == "(":
        opening = re.compile(r"\((?:\?(?:<?[=!]|[:>]|<\w+>|[imsx-]+:?))?").match(pattern, index)
        assert opening is not None
        end = opening.end()
        return (end + 1, "") if opening[0][-1] in "imsx-" and pattern[end : end + 1] == ")" else (end, "(")
    return index + 1, sign if sign == ")" else ""


def _behind_class(pattern: str, index: int) -> int:
    """Return the position after the character class at ``index``; classes nest."""
    depth, start = 0, index
    while index < len(pattern):
        if pattern[index] == "\\":
            index += 1
        elif pattern[index] == "[":
            depth += 1
        elif pattern[index] == "]" and pattern[start:index] not in ("[", "[^"):
            depth -= 1
        index += 1
        if depth == 0:
            break
    return index


def _quantifier(pattern: str, index: int) -> tuple[int, int | None]:
    """Return the position after a quantifier at ``index``, and the most repetitions it allows (None: no bound)."""
    most: int | None = 1
    if pattern[index : index + 1] in ("*", "+"):
        index, most = index + 1, None
    elif pattern[index : index + 1] == "?":
        index += 1
    elif match := _BOUNDED.match(pattern, index):
        low, comma, high = match.groups()
        index, most = match.end(), None if comma and not high else int((high or low or "1")[:9])
    while pattern[index : index + 1] in ("?", "+") and pattern[index : index + 1]:
        index += 1  # lazy or possessive
    return index, most


def _ids(content: dict[str, Any]) -> Iterator[int]:
    vocabulary = content["model"]["vocab"]
    yield from map(int, vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
    yield from (int(added["id"]) for added in content.get("added_tokens") or [])


def _patterns(content: Any) -> Iterator[str]:
    """Yield the regular expressions of normalizers, pre-tokenizers and decoders, at any depth."""
    if isinstance(content, dict):
        if isinstance(content.get("Regex"), str):
            yield content["Regex"]
        for key, inner in content.items():
            if key not in ("vocab", "merges", "added_tokens"):
                yield from _patterns(inner)
    elif isinstance(content, list):
        for inner in content:
            yield from _patterns(inner)

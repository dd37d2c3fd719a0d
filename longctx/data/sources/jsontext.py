"""Read what JSON objects hold: one per line, concatenated, or in an array; long objects are never parsed whole.

A parsed string takes up to four bytes per character in Python. So the long strings of a large object are removed before
it is parsed, and the one that holds the text is decoded in parts.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Iterator
from typing import Any

from longctx.data.sources.document import TEXT, Kind
from longctx.data.sources.records import HOLDS, conversation_of, is_conversation
from longctx.data.sources.streams import Stream
from longctx.errors import DataError

MAX_BYTES = 2**30  # of one line, or one object
_LARGE = 2**22
_LONG_STRING = 2**16
_PART_BYTES = 2**19
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_STRINGS = re.compile(_STRING, re.DOTALL)
_TOKENS = re.compile(_STRING + rb'|[\[\]{}]|"', re.DOTALL)
_BETWEEN = re.compile(rb"[\s,]*")
# Whole characters and escapes, with both halves of a surrogate pair together.
_UNITS = re.compile(
    rb"(?:[^\\]++|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\[^u])*+",
    re.DOTALL,
)
_Found = Iterator[tuple[str, Kind, Iterator[str]]]


def json_lines(stream: Stream, field: str | None) -> _Found:
    """Yield (place, kind, text in parts) of each line that is not blank. Raises: DataError (naming line and byte)."""
    offset = 0
    for number, line in enumerate(stream.lines(MAX_BYTES), 1):
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.isspace():
            where = f"{stream.file}:{number} (byte {offset})"
            yield str(number), *document_of(line, field, where, "a JSON object on one line")
        offset += len(line)


def json_values(stream: Stream, field: str | None) -> _Found:
    """Yield (number, kind, text in parts) of each object of an array, or of objects in sequence. Raises: DataError."""
    for number, (offset, raw) in enumerate(_objects(stream), 1):
        where = f"{stream.file}: object {number} (byte {offset})"
        yield str(number), *document_of(raw, field, where, "a JSON object")


def document_of(raw: bytes | bytearray, field: str | None, where: str, what: str) -> tuple[Kind, Iterator[str]]:
    """Return the text under ``field`` of a JSON object in parts, or else its conversation as records.py writes it.

    Args:
        field: None: only a conversation is read.

    Raises:
        DataError: not ``what``, neither of these, or half of a surrogate pair (when that part is read).
    """
    mark, cuts = "", []
    if len(raw) > _LARGE:
        mark = secrets.token_hex(16)

        def shorten(found: re.Match[bytes]) -> bytes:
            if found.end() - found.start() < _LONG_STRING:
                return found[0]
            cuts.append(found.span())
            return f'"{mark}{len(cuts) - 1}"'.encode()

        skeleton = _STRINGS.sub(shorten, raw)
    try:
        value = json.loads((skeleton if mark else raw).decode())
        if isinstance(value, dict) and field not in value and is_conversation(value):
            kind, text = conversation_of(json.loads(raw.decode()) if mark else value, where)
            return kind, _encodable(iter([text]), where, what)
        text = _field(value, field, where, what)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not {what} ({error}); repair or remove it") from None
    if mark and text.startswith(mark):
        begin, end = cuts[int(text.removeprefix(mark))]
        return TEXT, _encodable(_unescaped(raw, begin + 1, end - 1), where, what)
    return TEXT, _encodable(iter([text]), where, what)


def _encodable(parts: Iterator[str], where: str, what: str) -> Iterator[str]:
    try:
        for part in parts:
            part.encode()
            yield part
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair at character {error.start}; repair the line") from None
    except ValueError as error:
        raise DataError(f"{where}: not {what} ({error}); repair or remove it") from None


def _field(value: Any, field: str | None, where: str, what: str) -> str:
    if isinstance(value, dict) and isinstance(value.get(field), str):
        return str(value[field])
    if isinstance(value, dict) and field in value:
        kind = {"NoneType": "null", "dict": "an object", "list": "an array", "bool": "true or false"}.get(
            type(value[field]).__name__, "a number"
        )
        raise DataError(f"{where}: the value of the key {field!r} is {kind}, not text; repair or remove it")
    found = ", ".join(map(repr, list(value)[:8])) if isinstance(value, dict) else type(value).__name__
    if field is None:
        raise DataError(f"{where}: no {HOLDS} (found: {found}); repair or remove it, or set data.format: auto")
    raise DataError(
        f"{where}: no text under the key {field!r} (found: {found}); give the key that holds the text as "
        "data.text_field, or read whole files as they are with data.format: text"
    )


def _unescaped(raw: bytes | bytearray, begin: int, end: int) -> Iterator[str]:
    """Decode the inside of a JSON string, in parts."""
    while begin < end:
        place = min(begin + _PART_BYTES, end)
        if place < end:
            found = _UNITS.match(raw, begin, place)
            place = found.end() if found and found.end() > begin else place
            while place > begin + 1 and raw[place] & 0xC0 == 0x80:  # in the middle of a character
                place -= 1
        yield json.loads(b'"' + bytes(raw[begin:place]) + b'"')
        begin = place


def _objects(stream: Stream) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of each object, in an array or concatenated."""
    buffer, offset, ended = stream.read().removeprefix(codecs.BOM_UTF8), 0, False
    gap = len(buffer) - len(buffer.lstrip())
    array = buffer[gap : gap + 1] == b"["
    begin, closed = gap + int(array), False
    while True:
        begin = _BETWEEN.match(buffer, begin).end()  # type: ignore[union-attr]  # it can match the empty string
        first = buffer[begin : begin + 1]
        if first == b"{" and not closed:
            end = _end_of_object(buffer, begin)
            if end:
                yield offset + begin, buffer[begin:end]
                begin = end
                continue
        elif first == b"]" and array and not closed:
            closed, begin = True, begin + 1
            continue
        elif first:
            raise DataError(
                f"{stream.file}: byte {offset + begin}: {first!r} where an object or the end should be; only JSON "
                "objects, JSON lines and arrays of objects are read: repair it, or set data.format: text"
            )
        if ended:
            break
        offset, buffer, begin = offset + begin, buffer[begin:], 0
        data = stream.read(max(len(buffer), 2**20))
        ended = not data
        buffer += data
        if len(buffer) > 2 * MAX_BYTES:
            raise DataError(f"{stream.file}: byte {offset}: an object of more than {MAX_BYTES} bytes; make JSON lines")
    if first or (array and not closed):
        raise DataError(f"{stream.file}: byte {offset + len(buffer)}: the JSON ends too early; copy the file again")


def _end_of_object(buffer: bytes, begin: int) -> int:
    """Return the end of the object that begins at ``begin``, or 0 if the buffer ends before it."""
    depth = 0
    for found in _TOKENS.finditer(buffer, begin):
        token = buffer[found.start() : found.start() + 1]
        if token in b"{[":
            depth += 1
        elif token in b"}]":
            depth -= 1
            if depth == 0:
                return found.end()
        elif found.end() - found.start() == 1:  # a string that continues after the buffer
            return 0
    return 0

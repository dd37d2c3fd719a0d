"""Tokenizer classes: their common interface, plain bytes, and those run by the ``tokenizers`` package."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longctx.data.tokenizers import folder as tokenizer_folder
from longctx.data.tokenizers.hash import Frame, tokenizer_hash
from longctx.data.tokenizers.special import SpecialStrings, surround
from longctx.data.tokens.writer import disk_errors, publish_bytes
from longctx.data.words import Tokens, WordTable, applies

END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocabulary_size: one above the largest id.
        end_of_document: id that ends a document, or None; text never encodes to it unless special strings are parsed.
        beginning: id that transformers calls ``bos_token_id``, or None.
        prefix, suffix: ids that the tokenizer's post-processor puts before and after a text.
        hash: 64 hex digits; equal for tokenizers that give equal ids.
        json: the content of its tokenizer.json.
        folder: the transformers folder that it was loaded from, or None.
        transformers: the transformers tokenizer built from that folder, or None.
    """

    vocabulary_size: int
    json: dict[str, Any]
    folder: Path | None = None
    transformers: Any = None

    def __init__(
        self,
        content: dict[str, Any],
        end_of_document: int | None,
        beginning: int | None = None,
        frame: Frame = ((), ()),
    ) -> None:
        self.json, self.end_of_document, self.beginning = content, end_of_document, beginning
        self.prefix, self.suffix = frame
        self.hash = tokenizer_hash(content, end_of_document, frame)
        self.special = SpecialStrings(content)
        self._prepends_space = _prepends_space(content.get("normalizer"))

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, parse: bool = False) -> list[Tokens]:
        """Return the (tokens,) uint32 ids of each text, without added special tokens.

        Args:
            parse: special-token strings in a text become special tokens; otherwise they are ordinary text.
        """

    def encode(self, text: str) -> Tokens:
        """Return the (tokens,) uint32 ids of one text."""
        return self.encode_batch([text])[0]

    def document(self, ids: Tokens) -> Tokens:
        """Return the (tokens,) ids of a whole document with the post-processor's special tokens, not doubled."""
        return surround(ids, self.prefix, self.suffix)

    def continuation(self, piece: str) -> str:
        """Return the text to encode for a piece that continues a longer text.

        A Prepend normalizer (Llama 2) puts a space in front of every text. For a later piece that space would be one
        too many, so the piece's own leading space is removed.
        """
        return piece[1:] if self._prepends_space and len(piece) > 1 and piece[0] == " " else piece

    def prompt(self, text: str) -> Tokens:
        """Return the (tokens,) uint32 ids that transformers' ``tokenizer(text)`` gives."""
        ids = self.encode_batch([text], parse=True)[0]
        return np.array([*self.prefix, *ids.tolist(), *self.suffix], dtype=np.uint32)

    @abstractmethod
    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of ids; special tokens are left out."""

    def save(self, folder: str | Path) -> None:
        """Write a folder that ``transformers.AutoTokenizer.from_pretrained`` and ``load_tokenizer`` read.

        A tokenizer that came from a transformers folder is saved by copying that folder's files unchanged.
        """
        folder = Path(folder)
        if self.folder is not None:
            tokenizer_folder.copy(self.folder, folder)
            tokenizer_folder.copy_model_type(self.folder, folder)
            return
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.end_of_document is not None:
            name = self.token(self.end_of_document)
            settings |= {"bos_token": name, "eos_token": name, "pad_token": name}
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer_folder.forget_model_type(folder)
            for left in tokenizer_folder.files(folder):  # files of another tokenizer
                (folder / left).unlink(missing_ok=True)
        publish_bytes(json.dumps(self.json, ensure_ascii=False, indent=1).encode(), folder / "tokenizer.json")
        publish_bytes(json.dumps(settings, indent=1).encode(), folder / tokenizer_folder.SETTINGS)

    def token(self, index: int) -> str:
        """Return the tokenizer's own string for an id."""
        for added in self.json.get("added_tokens") or []:
            if added["id"] == index:
                return str(added["content"])
        return f"<{index}>"


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 ends a document. No training, no dependency."""

    def __init__(self) -> None:
        alphabet = byte_alphabet()
        super().__init__(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [_added(256, END_OF_DOCUMENT)],
                "normalizer": None,
                "pre_tokenizer": _byte_level(use_regex=False),
                "post_processor": None,
                "decoder": _byte_level(use_regex=False),
                "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(alphabet)}, "merges": []},
            },
            256,
            beginning=256,
        )
        self.vocabulary_size = 257

    def encode_batch(self, texts: Sequence[str], *, parse: bool = False) -> list[Tokens]:
        if not parse:
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]
        end = np.array([256], dtype=np.uint32)
        pieces = [[end if i % 2 else self.encode(p) for i, p in enumerate(self.special.split(t))] for t in texts]
        return [np.concatenate(parts) for parts in pieces]

    def decode(self, ids: npt.ArrayLike) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")


class LibraryTokenizer(Tokenizer):
    """A tokenizer run by the ``tokenizers`` package.

    Args:
        backend: a ``tokenizers.Tokenizer``; its settings are changed.
        theirs: the transformers tokenizer whose ``backend`` it is a copy of, or None for a bare tokenizer.json.
    """

    def __init__(self, backend: Any, end_of_document: int | None, theirs: Any = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|endoftext|>" inside a text is text, it cannot end a document
        self.backend, self.transformers = backend, theirs
        beginning = end_of_document if theirs is None else theirs.bos_token_id
        super().__init__(json.loads(backend.to_str()), end_of_document, beginning, _frame(backend))
        self._words = WordTable(self._encode_batch) if applies(self.json) else None
        self.vocabulary_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str], *, parse: bool = False) -> list[Tokens]:
        if parse and any(map(self.special.inside, texts)):
            self.backend.encode_special_tokens = False
            try:
                return self._encode_batch(texts)
            finally:
                self.backend.encode_special_tokens = True
        if self._words is None:
            return self._encode_batch(texts)
        return [self._words.encode(text) for text in texts]

    def _encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def prompt(self, text: str) -> Tokens:
        if self.transformers is None:
            return super().prompt(text)
        return np.array(self.transformers(text, verbose=False)["input_ids"], dtype=np.uint32)

    def decode(self, ids: npt.ArrayLike) -> str:
        listed = np.asarray(ids).tolist()
        if self.transformers is None:
            return str(self.backend.decode(listed, skip_special_tokens=True))
        return str(self.transformers.decode(listed, skip_special_tokens=True))

    def token(self, index: int) -> str:
        return str(self.backend.id_to_token(index))


def byte_alphabet() -> list[str]:
    """Return the printable character that byte-level tokenizers write for each of the 256 bytes (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _frame(backend: Any) -> Frame:
    """Return the ids that a backend's post-processor puts before and after a text."""
    marks: list[int] = []
    ids: list[int] = []
    if backend.num_special_tokens_to_add(False):
        for probe in ("a", "0", "\n", "."):  # one that is at least one token
            encoding = backend.encode(probe, add_special_tokens=True)
            ids, marks = encoding.ids, encoding.special_tokens_mask
            if 0 in marks:
                break
    if 0 not in marks:
        return tuple(ids), ()
    first, last = marks.index(0), len(marks) - marks[::-1].index(0)
    return tuple(ids[:first]), tuple(ids[last:])


def _added(index: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _prepends_space(normalizer: dict[str, Any] | None) -> bool:
    """Tell whether a tokenizer.json's normalizer puts a space in front of every text."""
    if not normalizer:
        return False
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return any(step["type"] == "Prepend" and step["prepend"] in (" ", "\u2581") for step in steps)

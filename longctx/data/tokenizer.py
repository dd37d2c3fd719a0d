"""Tokenizers: a byte-level BPE trained here, any ``tokenizer.json``, or plain bytes, which need no package at all.

All three are saved as a folder that transformers loads, and named by a hash of what decides their output, so that
saving, loading and saving again with other versions does not change the name.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longctx.data.tokenizer_file import read_tokenizer_file, tokenizer_file
from longctx.data.tokenwriter import disk_errors, publish_bytes
from longctx.data.words import Tokens, WordTable, applies
from longctx.errors import DataError, MissingPackageError

END_OF_DOCUMENT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocabulary_size: one above the largest id.
        end_of_document: id that ends a document, or None; text never encodes to it.
        hash: 64 hex digits that name what the tokenizer does.
        json: the content of its tokenizer.json.
    """

    vocabulary_size: int
    end_of_document: int | None
    json: dict[str, Any]

    def __init__(self, content: dict[str, Any], end_of_document: int | None) -> None:
        self.json, self.end_of_document = content, end_of_document
        self.hash = tokenizer_hash(content, end_of_document)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the (tokens,) uint32 ids of each text, without special tokens."""

    def encode(self, text: str) -> Tokens:
        """Return the (tokens,) uint32 ids of one text."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of ids; special tokens are left out."""

    def save(self, folder: str | Path) -> None:
        """Write a folder that ``transformers.AutoTokenizer.from_pretrained`` and ``load_tokenizer`` read."""
        folder = Path(folder)
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.end_of_document is not None:
            name = self.token(self.end_of_document)
            settings |= {"bos_token": name, "eos_token": name, "pad_token": name}
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        publish_bytes(json.dumps(self.json, ensure_ascii=False, indent=1).encode(), folder / "tokenizer.json")
        publish_bytes(json.dumps(settings, indent=1).encode(), folder / "tokenizer_config.json")

    def token(self, index: int) -> str:
        """Return how the tokenizer itself writes an id."""
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
        )
        self.vocabulary_size = 257

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: npt.ArrayLike) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")


class LibraryTokenizer(Tokenizer):
    """A tokenizer run by the ``tokenizers`` package."""

    def __init__(self, backend: Any, end_of_document: int | None) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|endoftext|>" inside a text is text, it cannot end a document
        super().__init__(json.loads(backend.to_str()), end_of_document)
        self.backend = backend
        self._words = WordTable(self._encode_batch) if applies(self.json) else None
        self.vocabulary_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        if self._words is None:
            return self._encode_batch(texts)
        return [self._words.encode(text) for text in texts]

    def _encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: npt.ArrayLike) -> str:
        return str(self.backend.decode(np.asarray(ids).tolist(), skip_special_tokens=True))

    def token(self, index: int) -> str:
        return str(self.backend.id_to_token(index))


def train_bpe(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Train a byte-level BPE; any text can be encoded with it and decoded back exactly.

    Args:
        texts: the sample to learn from; some ten megabytes are plenty.
        vocabulary_size: at least 257 (256 bytes and the end of a document); the result may be smaller on little text.

    Raises:
        DataError: vocabulary too small.
        MissingPackageError: ``tokenizers`` is not installed.
    """
    if not 257 <= vocabulary_size <= 2**20:
        raise DataError(f"vocabulary_size {vocabulary_size}: a byte-level BPE has 257 to {2**20} tokens")
    library = _library()
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return LibraryTokenizer(backend, backend.token_to_id(END_OF_DOCUMENT))


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        source: "bytes", a ``tokenizer.json``, or a folder that holds one (a transformers model or tokenizer folder).

    Raises:
        DataError: missing or damaged.
        MissingPackageError: ``tokenizers`` is needed and not installed.
    """
    if str(source) == "bytes":
        return ByteTokenizer()
    path = tokenizer_file(source)
    content = read_tokenizer_file(path)
    try:
        model_type = content["model"]["type"] if content["model"].get("type") else "BPE"
        ends = _end_of_document(content, path.parent)
        if tokenizer_hash(content, ends) == ByteTokenizer().hash:
            return ByteTokenizer()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error})") from None
    library = _library()
    try:
        backend = library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"{path}: `tokenizers` cannot read this {model_type} tokenizer: {error}") from None
    return LibraryTokenizer(backend, ends)


def tokenizer_hash(content: dict[str, Any], end_of_document: int | None) -> str:
    """Return 64 hex digits that name a tokenizer.json by what decides the ids of a text.

    Left out: decoder, post-processor, truncation, padding, and defaults that some versions write and others do not.
    """
    model = dict(content["model"])
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.pop("merges", None) or []]
    vocabulary = model.pop("vocab")
    model["type"] = model.get("type") or "BPE"
    added = [[t["id"], t["content"]] for t in content.get("added_tokens") or []]
    named = {
        "model": _essential(model),
        "vocabulary": sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary,
        "merges": merges,
        "added_tokens": sorted(added),
        "normalizer": _essential(content.get("normalizer")),
        "pre_tokenizer": _essential(content.get("pre_tokenizer")),
        "end_of_document": end_of_document,
    }
    return hashlib.sha256(json.dumps(named, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def byte_alphabet() -> list[str]:
    """Return the printable character that byte-level tokenizers write for each of the 256 bytes (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _end_of_document(content: dict[str, Any], folder: Path) -> int | None:
    """Find the end-of-document id: the folder's ``eos_token``, else a name that is known to mean it."""
    ids = dict(content["model"]["vocab"]) if isinstance(content["model"]["vocab"], dict) else {}
    ids |= {added["content"]: added["id"] for added in content.get("added_tokens") or []}
    settings = folder / "tokenizer_config.json"
    named: Any = None
    if settings.is_file():
        named = json.loads(settings.read_bytes()).get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
    for name in (named, *_KNOWN_ENDS):
        if name in ids:
            return int(ids[name])
    return None


def _essential(value: Any) -> Any:
    """Drop keys whose value is None, False or empty: versions differ in whether they write them."""
    if isinstance(value, dict):
        kept = {key: _essential(inner) for key, inner in value.items() if key != "trim_offsets"}
        return {key: inner for key, inner in kept.items() if inner not in (None, False, "", [], {})}
    if isinstance(value, list):
        return [_essential(inner) for inner in value]
    return value


def _added(index: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise MissingPackageError(
            "the package `tokenizers` is not installed: `pip install tokenizers`, or use the tokenizer 'bytes'"
        ) from None
    return tokenizers

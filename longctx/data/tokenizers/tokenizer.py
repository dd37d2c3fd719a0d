"""Train or load a tokenizer: a byte-level BPE trained here, any ``tokenizer.json``, or plain bytes without any package.

A tokenizer with a transformers folder behaves as the one that transformers loads from that folder, and is saved by
copying the folder's files. Each is identified by a hash of what decides its ids, which saving and loading with other
versions does not change.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longctx.data.tokenizers import folder as tokenizer_folder
from longctx.data.tokenizers.file import read_tokenizer_file, tokenizer_file
from longctx.data.tokenizers.hash import tokenizer_hash
from longctx.data.tokenizers.kinds import END_OF_DOCUMENT, ByteTokenizer, LibraryTokenizer, Tokenizer, byte_alphabet
from longctx.errors import DataError, MissingPackageError

__all__ = [
    "END_OF_DOCUMENT", "ByteTokenizer", "LibraryTokenizer", "Tokenizer", "byte_alphabet", "load_tokenizer",
    "require_kept", "tokenizer_hash", "train_bpe",
]  # fmt: skip

_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


def train_bpe(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Train a byte-level BPE; any text can be encoded with it and decoded back exactly.

    Args:
        texts: the training sample; ten megabytes are enough.
        vocabulary_size: at least 257 (256 bytes and the end of a document); smaller if there is little text.

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
        source: "bytes", a ``tokenizer.json``, or a folder that holds one. If a tokenizer_config.json or a model's
            config.json lies beside it, the tokenizer is what transformers' AutoTokenizer loads from that folder.

    Raises:
        DataError: missing or damaged, or refused by transformers.
        MissingPackageError: ``tokenizers`` is needed and not installed.
    """
    if str(source) == "bytes":
        return ByteTokenizer()
    path = tokenizer_file(source)
    content = read_tokenizer_file(path)
    try:
        model_type = content["model"]["type"] if content["model"].get("type") else "BPE"
        end = _end_of_document(content)
        is_bytes = tokenizer_hash(content, end) == ByteTokenizer().hash and not content.get("post_processor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error})") from None
    described = any((path.parent / name).is_file() for name in (tokenizer_folder.SETTINGS, tokenizer_folder.CONFIG))
    loaded: Tokenizer
    if is_bytes:
        loaded = ByteTokenizer()
    elif described and path.name == "tokenizer.json":
        loaded = _from_transformers(path.parent, end)
    else:
        loaded = _bare(path, model_type, end)
    if described:
        loaded.folder = path.parent
    return loaded


def _bare(path: Path, model_type: str, end: int | None) -> LibraryTokenizer:
    """Return the tokenizer of a tokenizer.json that no transformers folder describes."""
    try:
        backend = _library().Tokenizer.from_str(path.read_text(encoding="utf-8"))
        if end is not None:  # text must not encode to it
            backend.add_special_tokens([backend.id_to_token(end)])
    except MissingPackageError:
        raise
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"{path}: `tokenizers` cannot read this {model_type} tokenizer: {error}") from None
    return LibraryTokenizer(backend, end)


def _from_transformers(folder: Path, end: int | None) -> LibraryTokenizer:
    """Return the tokenizer that transformers builds from a folder; nothing is downloaded, no code of the folder is run.

    Args:
        end: id that ends a document where the folder names no ``eos_token``.
    """
    _library()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    named = tokenizer_folder.read_json(folder / tokenizer_folder.SETTINGS).get("tokenizer_class")
    known = named or (folder / tokenizer_folder.CONFIG).is_file()
    loader: Any = AutoTokenizer if known else PreTrainedTokenizerFast
    try:
        theirs = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        backend = _library().Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    except Exception as error:  # a malformed folder can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{folder}: transformers cannot load this tokenizer ({reason}); save it again as a fast tokenizer of "
            "transformers, or give its tokenizer.json alone, in a folder of its own"
        ) from None
    eos = theirs.eos_token_id
    return LibraryTokenizer(backend, end if eos is None else int(eos), theirs)


def require_kept(tokenizer: Tokenizer, architecture: str) -> None:
    """Reject a tokenizer that transformers replaces by another for a model of ``architecture``.

    For some model types transformers builds its own class, with its own pre-tokenizer, from the vocabulary of any
    tokenizer.json. An exported model would then get other ids than it was trained on.

    Args:
        architecture: a transformers model type.

    Raises:
        DataError: transformers would replace it.
    """
    with tempfile.TemporaryDirectory(prefix="longctx-tokenizer-") as name:
        folder = Path(name)
        tokenizer.save(folder)
        (folder / tokenizer_folder.CONFIG).write_text(json.dumps({"model_type": architecture}), encoding="utf-8")
        read = _from_transformers(folder, tokenizer.end_of_document)
    if read.hash != tokenizer.hash:
        raise DataError(
            f"model.architecture {architecture}: for such a model transformers loads this run's tokenizer as a "
            f"{type(read.transformers).__name__}, which encodes text to other ids than the run would train on; give "
            f"data.tokenizer a folder of that class, or choose another architecture"
        )


def _end_of_document(content: dict[str, Any]) -> int | None:
    """Find the end-of-document id of a tokenizer.json by the usual names of that token."""
    ids = dict(content["model"]["vocab"]) if isinstance(content["model"]["vocab"], dict) else {}
    ids |= {added["content"]: added["id"] for added in content.get("added_tokens") or []}
    return next((int(ids[name]) for name in _KNOWN_ENDS if name in ids), None)


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

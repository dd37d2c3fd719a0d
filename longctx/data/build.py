"""Text in, token files out: survey the documents, make or load the tokenizer, split, tokenise, publish.

Runs in one process, before ranks start. The result is named by a hash of the documents and the settings, so a second
build of the same data returns at once. Documents go to the held-out file by a hash of their own text: copies of one
text are always on the same side.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longctx.data.special import CHOICES, COUNT, Special
from longctx.data.survey import Progress, Survey
from longctx.data.text import Source, open_source
from longctx.data.tokenfile import TokenFile
from longctx.data.tokenise import tokenise
from longctx.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from longctx.data.tokenwriter import TokenWriter, disk_errors, publish_bytes
from longctx.errors import DataError

RECORD = "build.json"
_RECIPE = 2  # raise when the same text and settings would give other files
_CLOCK_NS = 2 * 10**9  # a file changed less than this before the survey may change again unnoticed

Sources = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class TokenBuild:
    """What ``build_tokens`` made, and where.

    Attributes:
        folder, train, held_out, tokenizer: paths; ``held_out`` is None if no share was asked for.
        vocabulary_size, tokenizer_hash: what the model and the loader must agree with.
        report: counts (documents, bytes, tokens, held_out_documents, held_out_tokens, empty, special_strings, skipped,
            seconds).
        reused: nothing had to be done.
    """

    folder: Path
    train: Path
    held_out: Path | None
    tokenizer: Path
    vocabulary_size: int
    tokenizer_hash: str
    report: dict[str, Any]
    reused: bool = False


@dataclass(frozen=True)
class _Settings:
    tokenizer: str
    vocabulary_size: int | None
    held_out: float
    seed: int
    text_field: str
    sample_bytes: int
    sources: list[str]
    special_tokens: str
    recipe: int = _RECIPE


def build_tokens(
    sources: Sources,
    tokenizer: str | Path | Tokenizer,
    out_folder: str | Path,
    *,
    vocabulary_size: int = 16384,
    held_out: float = 0.01,
    seed: int = 0,
    text_field: str = "text",
    sample_bytes: int = 10_000_000,
    special_tokens: Special = "spell",
    reuse: bool = True,
    progress: Progress | None = None,
) -> TokenBuild:
    """Make ``train.tokens``, ``held_out.tokens``, ``tokenizer/`` and ``build.json`` in ``out_folder``.

    Args:
        sources: text files, ``.jsonl`` files, folders, "python-stdlib", "hf:NAME[[:CONFIG]:SPLIT]"; one or several.
        tokenizer: "bpe" (trained on the training documents), "bytes", a tokenizer.json or its folder, or a Tokenizer.
        vocabulary_size: of a "bpe"; the result may be smaller on little text.
        held_out: share of documents kept for evaluation, at least one; 0 for none. A single document is cut in two.
        seed: of the choice of held-out documents and of the sample the BPE learns from.
        text_field: key of the text in JSONL objects and dataset rows.
        sample_bytes: how much text the BPE learns from.
        special_tokens: "spell" encodes a string such as ``<|eot|>`` in a document like any other text, "parse" makes it
            the special token that it names.
        reuse: return what is in the folder if it was made from the same documents and settings.
        progress: called with (stage, bytes done, bytes in all).

    Raises:
        DataError: nothing to read, text that is not text, a full disk, or settings out of range.
        MissingPackageError: ``tokenizers`` or ``datasets`` is needed and absent.
    """
    if not 0 <= held_out <= 0.5:
        raise DataError(f"held_out {held_out}: the share of held-out documents is from 0 to 0.5")
    if sample_bytes < 1:
        raise DataError(f"sample_bytes {sample_bytes}: the BPE needs text to learn from")
    started = time.monotonic()
    given = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not given:
        raise DataError("no source of text was given; give text files, JSONL files, folders or 'python-stdlib'")
    if special_tokens not in CHOICES:
        raise DataError(f"special_tokens {special_tokens!r}: choose one of {', '.join(CHOICES)}")
    fixed = _resolve(tokenizer)
    settings = _Settings(
        fixed.hash if fixed else "bpe",
        None if fixed else vocabulary_size,
        held_out,
        seed,
        text_field,
        sample_bytes,
        [str(source) for source in given],
        special_tokens,
    )
    opened = [open_source(source, text_field) for source in given]
    folder = Path(out_folder)
    with _locked(folder):
        found = _recorded(folder) if reuse else None
        stamp = _stamp(opened)
        if found and stamp is not None and found["stamp"] == stamp and found["settings"] == asdict(settings):
            return _opened(folder, found, reused=True)
        survey = Survey(opened, seed, progress or _silent)
        named = {**asdict(settings), "sources": survey.content}  # the same text from another place is the same build
        key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
        reused = found is not None and found["key"] == key
        if found is None or not reused:
            (folder / RECORD).unlink(missing_ok=True)  # from here on the folder's files may not belong together
            for pattern in (".*.tokens-*", f".{RECORD}-*", "tokenizer/.token*.json-*"):
                for left in folder.glob(pattern):  # by a build that was killed; the lock says it is dead
                    left.unlink(missing_ok=True)
            found = _write(folder, survey, fixed, settings, time.monotonic() - started)
        found |= {"key": key, "settings": asdict(settings), "stamp": stamp}
        publish_bytes(json.dumps(found, indent=1).encode(), folder / RECORD)
        return _opened(folder, found, reused=reused)


def open_build(folder: str | Path) -> TokenBuild:
    """Return what an earlier ``build_tokens`` left in ``folder``, fully verified. Raises: DataError."""
    found = _recorded(Path(folder))
    if found is None:
        raise DataError(f"{folder}: no complete token files there; make them with `longctx data build`")
    return _opened(Path(folder), found, reused=True)


def _write(
    folder: Path, survey: Survey, fixed: Tokenizer | None, settings: _Settings, seconds: float
) -> dict[str, Any]:
    """Tokenise and publish; return the record."""
    started = time.monotonic()
    held_out = survey.held_out(settings.held_out)
    tokenizer = fixed
    if tokenizer is None:
        assert settings.vocabulary_size is not None
        tokenizer = train_bpe(survey.training_sample(held_out, settings.sample_bytes), settings.vocabulary_size)
    tokenizer.save(folder / "tokenizer")
    cut = settings.held_out if survey.split.size == 1 else 0.0
    common: dict[str, Any] = {
        "vocabulary_size": tokenizer.vocabulary_size,
        "tokenizer_hash": tokenizer.hash,
        "end_of_document": tokenizer.end_of_document,
    }
    metadata = {"sources": settings.sources, "seed": settings.seed, "content": survey.content}
    parse = settings.special_tokens == "parse"
    wants_both = bool(held_out.any()) or cut > 0
    with TokenWriter(folder / "train.tokens", **common, metadata={**metadata, "part": "train"}) as train:
        if wants_both:
            with TokenWriter(folder / "held_out.tokens", **common, metadata={**metadata, "part": "held_out"}) as other:
                special = tokenise(survey, tokenizer, held_out, cut, train, other, parse)
        else:
            (folder / "held_out.tokens").unlink(missing_ok=True)
            special = tokenise(survey, tokenizer, held_out, cut, train, train, parse)
    report = {
        "documents": survey.split.size,
        "bytes": survey.bytes,
        "tokens": train.token_count,
        "held_out_documents": other.document_count if wants_both else 0,
        "held_out_tokens": other.token_count if wants_both else 0,
        "empty": survey.empty,
        COUNT: special,
        "skipped": len(survey.skipped),
        "skipped_first": dict(list(survey.skipped.items())[:5]),
        "seconds": round(seconds + time.monotonic() - started, 2),
    }
    names = ["train.tokens", "held_out.tokens"] if wants_both else ["train.tokens"]
    files = {}
    for name in names:
        with TokenFile(folder / name) as file:
            file.verify()  # read back: what is on the disk is what was meant
            files[name] = file.identity
    return {
        "files": files,
        "vocabulary_size": tokenizer.vocabulary_size,
        "tokenizer_hash": tokenizer.hash,
        "report": report,
    }


def _resolve(tokenizer: str | Path | Tokenizer) -> Tokenizer | None:
    """Return a given tokenizer, or None if one is to be trained."""
    if not isinstance(tokenizer, Tokenizer):
        if str(tokenizer) == "bpe":
            return None
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer.end_of_document is None and not (tokenizer.prefix or tokenizer.suffix):
        raise DataError(
            f"data.tokenizer {str(tokenizer.folder or 'without a folder')!r} has no token between documents: it names "
            "no eos_token, and its post-processor adds none around a text, so packed documents would run into each "
            'other. Name one of its tokens as "eos_token" in its tokenizer_config.json'
        )
    return tokenizer


def _stamp(sources: list[Source]) -> list[Any] | None:
    """Return sizes and times of change of all files, or None where those cannot prove that nothing changed."""
    result: list[Any] = []
    now = time.time_ns()
    for source in sources:
        stamp = source.stamp()
        if stamp is None or any(now - int(changed) < _CLOCK_NS for _, _, changed in stamp):
            return None
        result.append(stamp)
    return result


def _recorded(folder: Path) -> dict[str, Any] | None:
    """Return the record of a complete build whose files are all there and unchanged, or None."""
    try:
        found: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        for name, identity in found["files"].items():
            if name not in ("train.tokens", "held_out.tokens"):
                return None
            with TokenFile(folder / name, tokenizer_hash=found["tokenizer_hash"]) as file:
                if file.identity != identity:
                    return None
                file.verify()
        if load_tokenizer(folder / "tokenizer").hash != found["tokenizer_hash"]:
            return None
        return found if {"key", "settings", "stamp", "report", "vocabulary_size"} <= found.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # DataError is a ValueError
        return None


def _opened(folder: Path, found: dict[str, Any], reused: bool) -> TokenBuild:
    return TokenBuild(
        folder,
        folder / "train.tokens",
        folder / "held_out.tokens" if "held_out.tokens" in found["files"] else None,
        folder / "tokenizer",
        found["vocabulary_size"],
        found["tokenizer_hash"],
        found["report"],
        reused,
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time build in a folder; the lock ends with the process."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _silent(stage: str, done: int, total: int) -> None:
    pass

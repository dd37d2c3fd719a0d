"""Write a build's files: train the tokenizer if none is given, tokenise, verify, and rename the files into place."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from pathlib import Path
from typing import Any

from longctx.data.sources.document import CHAT, PAIR
from longctx.data.sources.text import summarise
from longctx.data.survey import Survey
from longctx.data.tokenise import Counts, tokenise
from longctx.data.tokenizers.chat import ChatEncoder
from longctx.data.tokenizers.special import COUNT
from longctx.data.tokenizers.tokenizer import Tokenizer, train_bpe
from longctx.data.tokens.file import TokenFile
from longctx.data.tokens.record import HELD_OUT, RECORD, TOKENIZER, TRAIN, Settings
from longctx.data.tokens.writer import TokenWriter, disk_errors, sync_folder
from longctx.errors import DataError

ASIDE = ".building"


def make_build(
    folder: Path, survey: Survey, fixed: Tokenizer | None, settings: Settings, started: float
) -> dict[str, Any]:
    """Write everything to a temporary folder, verify it, and rename it into place; return the record.

    Args:
        survey: of the documents.
        fixed: the tokenizer; None: train a BPE.
        started: ``time.monotonic()`` at the start of the build.

    Raises:
        DataError: a full disk, documents that changed, conversations without a chat template.
    """
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)  # left by a build that was killed: the lock is free
    for left in folder.glob(f".{RECORD}-*"):
        left.unlink(missing_ok=True)
    try:
        with disk_errors(folder):
            aside.mkdir()
        found = _write(aside, survey, fixed, settings)
        (folder / RECORD).unlink(missing_ok=True)  # from here on the folder's files may not belong together
        for name in (TRAIN, HELD_OUT, TOKENIZER):
            if (folder / name).exists():
                os.replace(folder / name, aside / f"old-{name}")
            if (aside / name).exists():
                os.replace(aside / name, folder / name)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    found["report"]["seconds"] = round(time.monotonic() - started, 2)
    return found


def _write(folder: Path, survey: Survey, fixed: Tokenizer | None, settings: Settings) -> dict[str, Any]:
    """Tokenise; return the record."""
    held_out = survey.held_out(settings.held_out)
    tokenizer = fixed
    if tokenizer is None:
        if survey.kinds[CHAT]:
            raise DataError(
                f"data.tokenizer bpe: {survey.kinds[CHAT]} of the documents are conversations, which need a tokenizer "
                "with a chat template; give its folder as data.tokenizer"
            )
        assert settings.vocabulary_size is not None and settings.sample_bytes is not None
        tokenizer = train_bpe(survey.training_sample(held_out, settings.sample_bytes), settings.vocabulary_size)
        _return_freed_memory()
    tokenizer.save(folder / TOKENIZER)
    cut = settings.held_out if survey.split.size == 1 and not survey.kinds[CHAT] + survey.kinds[PAIR] else 0.0
    common: dict[str, Any] = {
        "vocabulary_size": tokenizer.vocabulary_size,
        "tokenizer_hash": tokenizer.hash,
        "end_of_document": tokenizer.end_of_document,
    }
    metadata = {"sources": settings.sources, "seed": settings.seed, "content": survey.content}
    encoder = ChatEncoder(tokenizer, settings.loss, settings.special_tokens == "parse")
    wants_both = bool(held_out.any()) or cut > 0
    with TokenWriter(folder / TRAIN, **common, metadata={**metadata, "part": "train"}) as train:
        if wants_both:
            with TokenWriter(folder / HELD_OUT, **common, metadata={**metadata, "part": "held_out"}) as other:
                counts = tokenise(survey, encoder, held_out, cut, train, other)
                other.metadata["by_source"] = _by_source(settings.sources, [ends[1] for ends in counts.ends])
        else:
            counts = tokenise(survey, encoder, held_out, cut, train, train)
        train.metadata["by_source"] = _by_source(settings.sources, [ends[0] for ends in counts.ends])
    written = [train, other] if wants_both else [train]
    files = {}
    for name in (TRAIN, HELD_OUT) if wants_both else (TRAIN,):
        survey.progress(f"checking {name}", 0, 0)
        with TokenFile(folder / name) as file:
            file.verify()  # read back: what is on disk is what was written
            files[name] = file.identity
    return {
        "files": files,
        "vocabulary_size": tokenizer.vocabulary_size,
        "tokenizer_hash": tokenizer.hash,
        "report": _report(survey, counts, *written),
    }


def _by_source(names: list[str], ends: list[int]) -> list[tuple[str, int]]:
    """Return (name, documents) of each source, from the number of documents up to its end."""
    return [(name, end - begin) for name, begin, end in zip(names, [0, *ends], ends, strict=False)]


def _report(survey: Survey, counts: Counts, train: TokenWriter, held_out: TokenWriter | None = None) -> dict[str, Any]:
    """Return the counts of a build (``TokenBuild.report``)."""
    report = {
        "documents": survey.split.size,
        "bytes": survey.bytes,
        "tokens": train.token_count,
        "held_out_documents": held_out.document_count if held_out else 0,
        "held_out_tokens": held_out.token_count if held_out else 0,
        "empty": survey.empty,
        COUNT: counts.special,
        "without_tokens": counts.without_tokens,
        "skipped_files": sum(left.files for _, left in survey.skipped),
        "skipped_bytes": sum(left.bytes for _, left in survey.skipped),
        "skipped": summarise(survey.skipped),
        "formats": dict(sorted(survey.formats.items())),
    }
    if survey.kinds[CHAT] or survey.kinds[PAIR]:
        ignored = train.ignored_tokens + (held_out.ignored_tokens if held_out else 0)
        report |= {
            "conversations": counts.conversations,
            "without_labels": counts.without_labels,
            "ignored_tokens": ignored,
        }
    return report


def _return_freed_memory() -> None:
    """Return memory that training a BPE has freed to the operating system, if the C library can: up to 100 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

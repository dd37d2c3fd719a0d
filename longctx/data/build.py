"""Build token files from text: survey the documents, train or load the tokenizer, split, tokenise, publish.

Runs in one process, before ranks start. The result is named by a hash of the documents and the settings, so a second
build of the same data returns immediately. A hash of a document's text decides whether it is held out, so copies of one
text are always in the same split.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longctx.data.make import ASIDE, make_build
from longctx.data.sources.document import CHAT, PAIR, Source
from longctx.data.sources.folder import would_read
from longctx.data.sources.text import AUTO, open_source
from longctx.data.sources.tokenfiles import Ids
from longctx.data.survey import Progress, Survey
from longctx.data.tokenizers.chat import LOSSES, Loss, template_hash
from longctx.data.tokenizers.special import CHOICES, Special
from longctx.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from longctx.data.tokens import record as records
from longctx.data.tokens.lock import locked
from longctx.data.tokens.record import HELD_OUT, RECORD, TOKENIZER, TRAIN, Settings
from longctx.data.tokens.writer import publish_bytes
from longctx.errors import DataError

_CLOCK_NS = 2 * 10**9  # a file changed less than this before the survey may change again unnoticed

Sources = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class TokenBuild:
    """The files that ``build_tokens`` wrote.

    Attributes:
        folder, train, held_out, tokenizer: paths; ``held_out`` is None if no share was asked for.
        vocabulary_size, tokenizer_hash: what the model and the loader must agree with.
        report: counts (documents, bytes, tokens, held_out_documents, held_out_tokens, empty, without_tokens,
            special_strings, seconds; with conversations also conversations, without_labels, ignored_tokens),
            ``formats`` (files read in each), and ``skipped_files``, ``skipped_bytes`` and
            ``skipped`` (by reason).
        record: key and settings of the build and hashes of its files; a later run compares them before it continues.
        reused: True if the folder already held this build.
    """

    folder: Path
    train: Path
    held_out: Path | None
    tokenizer: Path
    vocabulary_size: int
    tokenizer_hash: str
    report: dict[str, Any]
    record: dict[str, Any]
    reused: bool = False


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
    format: str = AUTO,
    exclude: Sequence[str] = (),
    loss: Loss = "assistant",
    streaming: bool = False,
    reuse: bool = True,
    continues: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TokenBuild:
    """Make ``train.tokens``, ``held_out.tokens``, ``tokenizer/`` and ``build.json`` in ``out_folder``.

    Everything is written to a temporary folder and renamed when it is complete: a build that fails changes nothing.

    Args:
        sources: files, folders, "python-stdlib", "hf:NAME[[:CONFIG]:SPLIT]"; one or several.
        tokenizer: "bpe" (trained on the training documents), "bytes", a tokenizer.json or its folder, or a Tokenizer.
        vocabulary_size: of a "bpe"; smaller if there is little text.
        held_out: share of documents kept for evaluation, at least one; 0 for none. A single document is split in two.
        seed: selects the held-out documents and the sample that the BPE is trained on.
        text_field: key or column of the text in JSON, tables and datasets.
        sample_bytes: how much text the BPE is trained on.
        special_tokens: "spell" encodes a string such as ``<|eot|>`` in a document like any other text, "parse" makes it
            the special token that it spells.
        format: "auto" (JSON, tables, parquet and Arrow are recognised by content), "text" (every file is one document,
            verbatim, including any markup), "chat" (records are read as conversations even if they have a text), or
            "tokens" (files are token files of nanoGPT, Megatron or datatrove).
        exclude: patterns of files in folders to leave out.
        loss: which tokens of conversations are labels: "all", "completion" or "assistant" (chat.py); of texts all are.
        streaming: read "hf:" sources as they arrive, several times, instead of keeping a copy in the cache of datasets.
        reuse: return the folder's build if it is of the same documents and settings.
        continues: ``TokenBuild.record`` of the data that a run's checkpoints were trained on; other data are rejected.
        progress: called with (stage, bytes done, total bytes).

    Raises:
        DataError: nothing to read, a file that cannot be read or holds no text, a full disk, settings out of range,
            or other data than ``continues``.
        MissingPackageError: ``tokenizers``, ``datasets`` or ``pyarrow`` is needed and absent.
    """
    started = time.monotonic()
    folder = Path(out_folder)
    given = [sources] if isinstance(sources, (str, Path)) else list(sources)
    _check(given, held_out, sample_bytes, folder, exclude)
    for name, value, known in (("special_tokens", special_tokens, CHOICES), ("loss", loss, LOSSES)):
        if value not in known:
            raise DataError(f"{name} {value!r}: choose one of {', '.join(known)}")
    fixed = _resolve(tokenizer)
    settings = Settings(
        fixed.hash if fixed else "bpe",
        None if fixed else vocabulary_size,
        held_out,
        seed,
        None if fixed else sample_bytes,
        special_tokens,
        [str(source) for source in given],
        text_field,
        format,
        list(exclude),
        loss=loss,
        chat_template=template_hash(fixed) if fixed else None,
    )
    if continues is not None:
        records.require_settings(continues, settings)
    ids = Ids(fixed.vocabulary_size, fixed.end_of_document) if fixed else None
    opened = [
        open_source(source, text_field, format=format, exclude=exclude, ids=ids, streaming=streaming)
        for source in given
    ]
    with locked(folder) as writable:
        found = records.recorded(folder) if reuse else None
        stamp = _stamp(opened)
        if found and stamp is not None and found["stamp"] == stamp and found["settings"] == asdict(settings):
            if continues is not None:
                records.require_text(continues, settings, found["key"])
            return _opened(folder, found, reused=True)
        survey = Survey(opened, seed, progress or (lambda *_: None))
        key = settings.key(survey.content, survey.kinds[CHAT] + survey.kinds[PAIR] > 0)
        if continues is not None:
            records.require_text(continues, settings, key)
        reused = found is not None and found["key"] == key
        if found is None or not reused:
            if not writable:
                raise DataError(f"{folder} holds other data and cannot be written; choose another data.folder")
            found = make_build(folder, survey, fixed, settings, started)
        found |= {"key": key, "settings": asdict(settings), "stamp": stamp}
        if writable:
            publish_bytes(json.dumps(found, indent=1).encode(), folder / RECORD)
            shutil.rmtree(folder / ASIDE, ignore_errors=True)
        return _opened(folder, found, reused=reused)


def open_build(folder: str | Path) -> TokenBuild:
    """Return the result of an earlier ``build_tokens`` in ``folder``, after verifying every file. Raises: DataError."""
    found = records.recorded(Path(folder))
    if found is None:
        raise DataError(f"{folder}: no complete token files there; build them with `longctx data build`")
    return _opened(Path(folder), found, reused=True)


def _check(
    given: Sequence[str | Path], held_out: float, sample_bytes: int, folder: Path, exclude: Sequence[str]
) -> None:
    if not 0 <= held_out <= 0.5:
        raise DataError(f"held_out {held_out}: the share of held-out documents is from 0 to 0.5")
    if sample_bytes < 1:
        raise DataError(f"sample_bytes {sample_bytes}: the BPE needs text to learn from")
    if not given:
        raise DataError("no source of text was given; give text files, JSONL files, folders or 'python-stdlib'")
    for source in given:
        if would_read(source, folder, exclude):
            raise DataError(
                f"{folder} is inside the source {str(source)!r}: token files would become text; choose another folder"
            )


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
    """Return size and modification time of every file, or None if these cannot prove that nothing changed."""
    result: list[Any] = []
    now = time.time_ns()
    for source in sources:
        stamp = source.stamp()
        if stamp is None or any(now - int(changed) < _CLOCK_NS for _, _, changed in stamp):
            return None
        result.append(stamp)
    return result


def _opened(folder: Path, found: dict[str, Any], reused: bool) -> TokenBuild:
    return TokenBuild(
        folder,
        folder / TRAIN,
        folder / HELD_OUT if HELD_OUT in found["files"] else None,
        folder / TOKENIZER,
        found["vocabulary_size"],
        found["tokenizer_hash"],
        found["report"],
        {name: found[name] for name in ("key", "settings", "files")},
        reused,
    )

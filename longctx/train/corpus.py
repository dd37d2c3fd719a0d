"""Get a run's token files from its `data:` section: build them from text, or open those of `longctx data build`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longctx.config.machine import token_folder
from longctx.config.schema import RunConfig
from longctx.data.build import TokenBuild, build_tokens, open_build
from longctx.data.pack import longer_than_row
from longctx.data.progress import Stages
from longctx.data.sources.folder import would_read
from longctx.data.tokenizers.special import note
from longctx.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer, require_kept
from longctx.data.tokens.file import TokenFile
from longctx.data.tokens.record import RECORD
from longctx.errors import DataError
from longctx.train import durable
from longctx.train.checkpoint import store

Say = Callable[[str], None]
TOKENIZER_TO_TRAIN = "bpe"  # data.tokenizer: auto resolves to it without a pretrained model
USED = "data.json"  # in the output folder: the record of the data to which the positions in the run's checkpoints refer


@dataclass(frozen=True)
class Corpus:
    """The data of a run, as paths: rank 0 builds the files, the other ranks only open them."""

    train: str
    held_out: str | None
    tokenizer: str
    vocabulary_size: int
    tokenizer_hash: str
    end_of_document: int | None
    beginning: int | None  # the tokenizer's bos_token_id
    report: dict[str, Any]


def prepare_corpus(config: RunConfig, say: Say) -> Corpus:
    """Return the run's token files; build them first if there are none. For one process; may take minutes.

    Raises:
        DataError: nothing to read, unreadable files, damaged token files, a tokenizer that does not match them or the
            architecture, or data that differ from those of the run's checkpoints.
    """
    build = build_corpus(config, say)
    output = Path(config.output.folder)
    if output.is_dir():
        durable.write_json(output / USED, build.record)
    tokenizer = load_tokenizer(build.tokenizer)
    return Corpus(
        str(build.train),
        str(build.held_out) if build.held_out else None,
        str(build.tokenizer),
        build.vocabulary_size,
        build.tokenizer_hash,
        tokenizer.end_of_document,
        tokenizer.beginning,
        build.report,
    )


def build_corpus(config: RunConfig, say: Say) -> TokenBuild:
    """Build or find the token files of a configuration; report what was read, skipped, and longer than a row.

    Raises:
        DataError: as ``prepare_corpus``; existing files are unchanged.
    """
    with Stages(say) as progress:
        build, how = _found_or_built(config, progress)
        build = _with_long_documents(build, config.data.sequence_length)
    _tell(build, how, say)
    _tell_long_documents(config, build, say)
    return build


def _found_or_built(config: RunConfig, progress: Stages) -> tuple[TokenBuild, str]:
    """Return the token files of a configuration, and how they came to be."""
    data = config.data
    continues = _record_of_checkpoints(Path(config.output.folder))
    folders = [Path(source) for source in data.sources if (Path(source) / RECORD).is_file()]
    if folders:
        if len(data.sources) > 1:
            raise DataError(
                f"data.sources mixes {folders[0]}, which `longctx data build` wrote, with other sources; give it "
                "alone, or build all sources together"
            )
        build = _opened(folders[0], data.tokenizer)
        _require_kept(config, str(build.tokenizer))
        if continues is not None and continues["files"] != build.record["files"]:
            raise DataError(
                f"data.sources: {folders[0]} does not hold the token files that this run's checkpoints were trained "
                "on; restore data.sources, or choose another output.folder"
            )
        return build, "found"
    for source in data.sources:
        if would_read(source, Path(config.output.folder), data.exclude):
            raise DataError(
                f"data.sources: output.folder {config.output.folder} is inside the source {source!r}, so the run would "
                "read its own files as text; choose an output.folder outside, or add it to data.exclude"
            )
    _require_kept(config, data.tokenizer)
    started = time.monotonic()
    build = build_tokens(
        list(data.sources),
        data.tokenizer,
        token_folder(config),
        vocabulary_size=data.vocab_size,
        held_out=data.held_out,
        seed=data.seed,
        text_field=data.text_field,
        sample_bytes=data.sample_bytes,
        format=data.format,
        exclude=data.exclude,
        special_tokens=data.special_tokens,
        loss=data.loss,
        streaming=data.streaming,
        continues=continues,
        progress=progress,
    )
    return build, "found" if build.reused else f"built in {time.monotonic() - started:.0f} s"


def _record_of_checkpoints(output: Path) -> dict[str, Any] | None:
    """Return the record of the data that the checkpoints in ``output`` were trained on, or None if there is none."""
    if not store.published(output / "checkpoints"):
        return None
    try:
        found = json.loads((output / USED).read_bytes())
        return found if {"key", "settings", "files"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):  # the run is older than this record
        return None


def _require_kept(config: RunConfig, tokenizer: str) -> None:
    """Reject a tokenizer that transformers would load differently from the run's exported model folder."""
    if config.model.architecture is not None:
        alike = ByteTokenizer() if tokenizer == TOKENIZER_TO_TRAIN else load_tokenizer(tokenizer)
        require_kept(alike, config.model.architecture)


def _opened(folder: Path, tokenizer: str) -> TokenBuild:
    """Open the output of `longctx data build`; raise DataError for a damaged file or a different tokenizer."""
    for file in sorted(folder.glob("*.tokens")):
        with TokenFile(file) as tokens:
            tokens.verify()
    build = open_build(folder)
    if tokenizer != TOKENIZER_TO_TRAIN and load_tokenizer(tokenizer).hash != build.tokenizer_hash:
        raise DataError(
            f"{folder} was not built with data.tokenizer {tokenizer!r}; build it again with that tokenizer, or remove "
            "data.tokenizer to use the folder's own"
        )
    return build


def _with_long_documents(build: TokenBuild, sequence_length: int) -> TokenBuild:
    """Add to the report how many training documents are longer than a row."""
    with TokenFile(build.train) as file:
        documents, tokens, beyond = longer_than_row(file.offsets, sequence_length)
    counts = {"longer_than_row": documents, "longer_than_row_tokens": tokens, "tokens_beyond_row": beyond}
    return replace(build, report=build.report | counts)


def _tell_long_documents(config: RunConfig, build: TokenBuild, say: Say) -> None:
    report, data = build.report, config.data
    if not report["longer_than_row"]:
        return
    done = {
        "split": f"are split; {report['tokens_beyond_row']:,} of their tokens are in rows without their beginning",
        "truncate": f"are truncated, which leaves out {report['tokens_beyond_row']:,} tokens",
        "drop": f"are left out, with {report['longer_than_row_tokens']:,} tokens",
    }[data.long_documents]
    say(
        f"data: {report['longer_than_row']:,} documents are longer than data.sequence_length "
        f"{data.sequence_length:,} and {done} (data.long_documents: {data.long_documents})"
    )


def _tell(build: TokenBuild, how: str, say: Say) -> None:
    """Report what the token files hold and, by reason, what was skipped."""
    report = build.report
    say(
        f"data: {report['documents']:,} documents, {report['tokens']:,} tokens to train on, "
        f"{report['held_out_tokens']:,} held out ({how} in {build.folder})"
    )
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in report.get("formats", {}).items())
    if kinds:
        say(f"data: files read: {kinds}")
    for left in report.get("skipped", []):
        first = ", ".join(left["first"][:3]) + (", …" if len(left["first"]) > 3 else "")
        say(f"data: left out, {left['why']}: {left['files']:,} files, {left['bytes']:,} bytes ({first})")
    if said := note(report, build.record["settings"].get("special_tokens", "spell")):
        say(f"data: {said}")
    if report.get("conversations"):
        labels = report["tokens"] + report["held_out_tokens"] - report["ignored_tokens"]
        say(
            f"data: {report['conversations']:,} conversations; {labels:,} of all tokens are labels "
            f"(data.loss: {build.record['settings'].get('loss', 'all')})"
        )
    if build.record["settings"].get("loss", "assistant") != "assistant" and not report.get("conversations"):
        say("data: data.loss has no effect: no document is a conversation, and all tokens of texts are labels")
    for name, what in (
        ("empty", "documents are blank"),
        ("without_tokens", "documents have no token"),
        ("without_labels", "conversations have no token that data.loss counts"),
    ):
        if report.get(name):
            say(f"data: left out: {report[name]:,} {what}")

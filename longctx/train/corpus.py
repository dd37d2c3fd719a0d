"""From the `data:` section to token files: build them from text, or open what `longctx data build` made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from longctx.config.machine import token_folder
from longctx.config.schema import RunConfig
from longctx.data.build import RECORD, TokenBuild, build_tokens, open_build
from longctx.data.special import note
from longctx.data.tokenfile import TokenFile
from longctx.data.tokenizer import ByteTokenizer, load_tokenizer, require_kept
from longctx.errors import DataError

Say = Callable[[str], None]
TOKENIZER_TO_TRAIN = "bpe"  # what data.tokenizer: auto is without a pretrained model: no tokenizer is asked for


@dataclass(frozen=True)
class Corpus:
    """What a run trains on. Paths, so that rank 0 can build it and the others only open it."""

    train: str
    held_out: str | None
    tokenizer: str
    vocabulary_size: int
    tokenizer_hash: str
    end_of_document: int | None
    beginning: int | None  # the tokenizer's bos_token_id


def prepare_corpus(config: RunConfig, say: Say) -> Corpus:
    """Return the run's token files, made now if need be. For one process; it may take minutes on much text.

    Raises:
        DataError: nothing to read, damaged token files, or a tokenizer that does not match them or the architecture.
    """
    data = config.data
    folders = [Path(source) for source in data.sources if (Path(source) / RECORD).is_file()]
    if folders:
        if len(data.sources) > 1:
            raise DataError(
                f"data.sources mixes {folders[0]}, which `longctx data build` made, with other sources; give it alone, "
                "or build all sources together"
            )
        opened = _opened(folders[0], data.tokenizer)
        _require_kept(config, str(opened.tokenizer))
        return _corpus(opened)
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
        special_tokens=data.special_tokens,
        progress=_Stages(say),
    )
    report = build.report
    how = "found in" if build.reused else f"built in {time.monotonic() - started:.0f} s in"
    say(
        f"data: {report['documents']:,} documents, {report['tokens']:,} tokens to train on, "
        f"{report['held_out_tokens']:,} held out ({how} {build.folder})"
    )
    if said := note(report, data.special_tokens):
        say(f"data: {said}")
    return _corpus(build)


def _require_kept(config: RunConfig, tokenizer: str) -> None:
    """Refuse a tokenizer that transformers would read as another one in the folder of the run's exported model."""
    if config.model.architecture is not None:
        alike = ByteTokenizer() if tokenizer == TOKENIZER_TO_TRAIN else load_tokenizer(tokenizer)
        require_kept(alike, config.model.architecture)


def _opened(folder: Path, tokenizer: str) -> TokenBuild:
    """Open what `longctx data build` left; say which file is damaged, and refuse another tokenizer than its own."""
    for file in sorted(folder.glob("*.tokens")):
        with TokenFile(file) as tokens:
            tokens.verify()
    build = open_build(folder)
    if tokenizer != TOKENIZER_TO_TRAIN and load_tokenizer(tokenizer).hash != build.tokenizer_hash:
        raise DataError(
            f"{folder} was built with another tokenizer than data.tokenizer {tokenizer!r}; build the text again with "
            f"that one, or remove data.tokenizer to use the folder's own"
        )
    return build


class _Stages:
    """Says once when each stage of a build begins."""

    def __init__(self, say: Say) -> None:
        self.say, self.stage = say, ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self.stage = stage
            self.say(f"data: {stage}")


def _corpus(build: TokenBuild) -> Corpus:
    tokenizer = load_tokenizer(build.tokenizer)
    return Corpus(
        str(build.train),
        str(build.held_out) if build.held_out else None,
        str(build.tokenizer),
        build.vocabulary_size,
        build.tokenizer_hash,
        tokenizer.end_of_document,
        tokenizer.beginning,
    )

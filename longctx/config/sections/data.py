"""`data:` text sources, tokenizer and packing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from longctx.config.fields import HumanInt, Section, Texts, Weights, environment_field, listed


class WeightedSource(Section):
    """One entry of `data.sources` with its weight (mixture.py reads it as `data.sources` and `data.weights`)."""

    path: str
    weight: float = Field(1.0, gt=0)


Sources = Annotated[tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str | WeightedSource])]


class DataSection(Section):
    """Text sources, the tokenizer, and how documents are packed into rows."""

    sources: Annotated[Sources, Field(min_length=1)] = environment_field(
        description="files of text, JSON lines, JSON, CSV, parquet, Arrow or tokens (recognised by content; also gzip, "
        "bzip2, xz, zstd), folders of them, hf:NAME[[:CONFIG]:SPLIT], python-stdlib (this Python's own source), or "
        "one folder that `longctx data build` wrote",
    )
    weights: Weights = Field(
        (),
        description="share of each source in the rows of a run, in any unit; also written sources: [{path: …, weight: "
        "…}]; empty: all documents are one data set",
    )
    exhausted: Literal["repeat", "stop"] = Field(
        "repeat",
        description="what follows when all rows of a source were read; repeat: its next epoch, in another order; stop: "
        "the run ends before a row is read a second time, if train.steps are not done by then",
    )
    text_field: str = Field(
        "text", min_length=1, description="key or column that holds the text in JSON, tables and datasets"
    )
    format: Literal["auto", "text", "chat", "tokens"] = Field(
        "auto",
        description="auto: JSON and tables are recognised by content, and a record without text_field by its messages, "
        "or prompt and completion; text: each file is one document, unparsed (source code, for example); chat: "
        "conversations are read from records that have a text too; tokens: token files of nanoGPT, Megatron or "
        "datatrove, made with data.tokenizer (the latter two are recognised by content)",
    )
    loss: Literal["all", "completion", "assistant"] = Field(
        "assistant",
        description="which tokens of a conversation are labels; assistant: those of assistant turns, or of a text "
        "completion; completion: of the completion, or the last assistant turn; all: every token. All tokens of texts "
        "are labels",
    )
    streaming: bool = Field(
        False,
        description="read hf: sources as they arrive, once per pass over the data, instead of keeping a copy in the "
        "cache of the package datasets",
    )
    exclude: Texts = Field(
        (), description="patterns such as '*.bin' or 'old/*' of files to leave out of folders (they are reported)"
    )
    tokenizer: str = environment_field(
        "auto",
        min_length=1,
        description="auto: that of `model.pretrained`, else bpe; bpe: train a byte-level BPE of `vocab_size`; bytes: "
        "one token per byte; else a tokenizer.json or its folder",
    )
    foreign_tokenizer: bool = Field(
        False,
        description="allow a tokenizer whose ids are not those that `model.pretrained` was trained with",
    )
    vocab_size: HumanInt = Field(
        8192, ge=257, le=2**20, description="size of the BPE to train (only for `tokenizer: bpe`)"
    )
    sample_bytes: HumanInt = Field(
        10_000_000, ge=1000, le=2**40, description="bytes of text to train the BPE on (only for `tokenizer: bpe`)"
    )
    special_tokens: Literal["spell", "parse"] = Field(
        "spell",
        description="how a string like <|eot|> inside a document is tokenized; spell: as ordinary text; parse: as its "
        "special token",
    )
    sequence_length: HumanInt = Field(ge=2, le=2**32, description="tokens per row, before it is sharded over the ring")
    packing: Literal["concat", "best_fit"] = Field(
        "concat",
        description="concat: documents end to end, split at row ends; best_fit: documents kept whole where they fit",
    )
    long_documents: Literal["split", "truncate", "drop"] = Field(
        "split",
        description="what is done with documents longer than a row; split: a row for each part; with packing: best_fit "
        "also truncate (their first tokens are a row) and drop. They are counted and reported",
    )
    held_out: float = Field(
        0.02,
        ge=0,
        le=0.5,
        description="fraction of the documents held out for evaluation and never trained on; 0: no evaluation",
    )
    folder: str | None = environment_field(
        None,
        min_length=1,
        description="where token files are written and reused; default: the folder `tokens` in output.folder",
    )
    seed: HumanInt = Field(
        0, ge=0, lt=2**63, description="seed of the order of samples and of the choice of held-out documents"
    )

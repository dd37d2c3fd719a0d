"""The hash of a tokenizer follows what decides its ids, and nothing else."""

from __future__ import annotations

from hypothesis import strategies as st

from longctx.data.tokenizers.tokenizer import (
    LibraryTokenizer,
    tokenizer_hash,
)

TEXT = st.text(
    st.one_of(st.sampled_from(" \n\t\r'sdlvemt09aZ_-\u00a0\u0085\u2028\x1c\x1f"), st.characters(codec="utf-8"))
)


def test_name_follows_what_the_tokenizer_does(bpe: LibraryTokenizer) -> None:
    def changed(**parts: object) -> str:
        return tokenizer_hash({**bpe.json, **parts}, bpe.end_of_document)

    model = bpe.json["model"]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    same = [
        changed(version="9", truncation={"max_length": 3}, padding={"length": 3}, decoder=None, post_processor=None),
        changed(model={**model, "merges": merges, "dropout": None, "byte_fallback": False}),
        changed(model=dict(reversed(model.items()))),
    ]
    other = [
        changed(model={**model, "merges": merges[::-1]}),
        changed(model={**model, "vocab": {**model["vocab"], "new": 1500}}),
        changed(normalizer={"type": "NFC"}),
        changed(pre_tokenizer={**bpe.json["pre_tokenizer"], "add_prefix_space": True}),
        changed(added_tokens=[]),
        tokenizer_hash(bpe.json, 5),
    ]
    assert set(same) == {bpe.hash} and bpe.hash not in other and len(set(other)) == len(other)


def test_what_only_some_versions_write_does_not_count() -> None:
    content = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}
    older = {"model": {"vocab": {"b": 1, "a": 0}, "merges": ["a b"], "dropout": None, "fuse_unk": False}}
    older |= {"added_tokens": [], "normalizer": None, "truncation": {"max_length": 8}, "decoder": {"type": "ByteLevel"}}
    assert tokenizer_hash(older, 1) == tokenizer_hash(content, 1)
    assert tokenizer_hash(content, 0) != tokenizer_hash(content, 1) != tokenizer_hash(content, 1, ((1,), ()))
    assert tokenizer_hash(content | {"normalizer": {"type": "NFC"}}, 1) != tokenizer_hash(content, 1)

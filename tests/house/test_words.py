"""The field's words: private words of earlier versions stay out of code, tests, documentation and messages."""

from __future__ import annotations

import re

import pytest
from house_files import ROOT, project_files

# private word (a regular expression): the field's word
PRIVATE = {
    r"\banew\b": "again, recomputed, rebuilt",
    r"\bmade of\b": "consists of, built from",
    r"\bcut over\b": "sharded over",
    r"\bcut (once more|apart)\b": "sharded again, split",
    r"\bdeal(t|s)? out\b": "shard, distribute",
    r"\bforeto(ld|ell)": "predicted",
    r"\bgo(es)? on with\b": "continue with, resume from",
    r"\blets? (it|them|both|all) go\b": "free, release",
    r"\bhand(s|ed)? on\b": "pass on",
    r"\bsmall talk\b": "exchange",
    r"\bexchang\w+ heads\b|\bheads exchanged\b": "all-to-all of heads",
    r"\bshortens the way\b": "cuts traffic",
    r"\blest\b": "so that … not",
    r"\bgives? nothing\b": "contributes nothing",
    r"\bper cent\b": "%",
    r"\bto be had\b": "available",
    r"\bat a stretch\b": "contiguous",
    r"\bstands? side by side\b": "are adjacent",
    r"\bhang a memory\b": "attach a state",
    r"\bsomebody (needs|asks|wants|reads)\b": "a rank needs, the caller reads",
    r"\bnobody (needs|asks|wants|reads)\b": "no rank needs, unused",
    r"\b(bytes|FLOPs|elements|tokens|seconds|logits?|columns?) a "
    r"(token|head|rank|layer|row|step|block|second|chunk|GPU)\b(?! (must )?(holds?|sends?)\b)": "per …",
}
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".cfg")
HERE = "tests/house/test_words.py"
KEPT = {("longctx/plan/plan.py", "heads exchanged")}  # a key of the plan's JSON, which programs read


def found(text: str) -> list[tuple[int, str, str]]:
    """Return (line, private word, the field's) of each use."""
    hits = []
    for number, line in enumerate(text.split("\n"), 1):
        for word, better in PRIVATE.items():
            hits += [(number, match.group(0), better) for match in re.finditer(word, line, re.IGNORECASE)]
    return hits


def test_private_words_are_gone() -> None:
    wrong = []
    for path in project_files():
        if path.suffix in SUFFIXES and path.as_posix() not in (HERE, "CHANGELOG.md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            wrong += [
                f"{path}:{line}: {word!r}: write {better!r}"
                for line, word, better in found(text)
                if (path.as_posix(), word) not in KEPT
            ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("word", ["made anew", "8 bytes a token", "one row is made of", "Heads exchanged"])
def test_the_check_sees_what_it_should(word: str) -> None:
    assert found(f"nothing here\nand {word} there")[0][0] == 2

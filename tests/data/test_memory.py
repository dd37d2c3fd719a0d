"""Memory of a build: at most three times the largest document, the package's own tables and all tokens included."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import longctx

SIZE = 64 * 2**20
MOST = 3.0

# Peak resident memory over that of the process with everything imported, in multiples of the document's size.
BUILD = """
import re, sys
import tokenizers, tokenizers.models, tokenizers.trainers
from longctx.data.build import build_tokens

def kib(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

build_tokens(sys.argv[1] + "/warm.txt", sys.argv[2], sys.argv[3] + "/warm", vocabulary_size=300)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = kib("VmRSS")
built = build_tokens(sys.argv[4], sys.argv[2], sys.argv[3], vocabulary_size=4096)
print(kib("VmHWM") - before, built.report["bytes"], built.report["documents"])
"""


def text() -> str:
    """Return 64 MiB of lines of words, nearly all ASCII: Python keeps a string with one emoji in four bytes each."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(30_000)]
    paragraph = "\n".join(" ".join(draw.choices(words, k=12)) for _ in range(12_000)) + " \U0001f600\n"
    return (paragraph * (SIZE // len(paragraph) + 1))[: SIZE - 4] + "end."


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("large.txt", "bytes"),
        pytest.param("large.txt", "bpe", marks=pytest.mark.deep),
        ("large.jsonl", "bytes"),
        pytest.param("large.jsonl", "bpe", marks=pytest.mark.slow),
    ],
)
def test_a_large_document_takes_at_most_three_times_its_size(tmp_path: Path, name: str, tokenizer: str) -> None:
    (tmp_path / "warm.txt").write_text("some words of text\n" * 2000)
    content = text()
    (tmp_path / name).write_text(content if name.endswith("txt") else json.dumps({"text": content}) + "\n")
    size = len(content.encode())
    del content
    done = subprocess.run(
        [sys.executable, "-c", BUILD, tmp_path, tokenizer, tmp_path / "out", tmp_path / name],
        cwd=Path(longctx.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, read, documents = map(int, done.stdout.split())
    assert (read, documents) == (size, 1)
    assert peak * 1024 <= MOST * size, f"{peak * 1024 / size:.2f} times the size of the document"

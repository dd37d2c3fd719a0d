"""Text is written as tokens come, whole characters only, and equals what decoding all tokens gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from longctx.generation.stream import TextStream


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids: Any) -> str:
        return bytes(np.asarray(ids, dtype=np.uint8).tolist()).decode("utf-8", errors="replace")


def streamed(text: str) -> tuple[list[str], TextStream]:
    written: list[str] = []
    stream = TextStream(Bytes(), written.append)  # type: ignore[arg-type]
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    assert stream.first is None
    for byte in text.encode():
        stream.put(torch.tensor([byte]))
    return written, stream


def test_the_prompt_is_not_written_and_characters_wait_for_their_bytes() -> None:
    written, stream = streamed("aé€b")
    assert [text for text in written if text] == ["a", "é", "€", "b"]
    assert stream.first is not None


def test_a_long_text_arrives_whole() -> None:
    text = "Grüße an alle, " * 40
    written, stream = streamed(text)
    stream.end()
    assert "".join(written) == text and len(stream.ids) - stream.start < 100


def test_what_is_left_is_written_at_the_end() -> None:
    written, stream = streamed("a")
    stream.put(torch.tensor([0xE2]))
    assert "".join(written) == "a"
    stream.end()
    assert "".join(written) == "a\ufffd"

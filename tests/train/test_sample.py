"""The sample of a finished run."""

from __future__ import annotations

from pathlib import Path

import torch
from pretrained_folders import pretrained_folder

from longctx.train.report.sample import draw_sample

from token_files import write


def test_the_first_document_longer_than_the_prompt_is_continued(tmp_path: Path) -> None:
    folder, tokens = pretrained_folder(tmp_path / "model"), write(tmp_path / "held_out.tokens")
    state = torch.get_rng_state()
    found = draw_sample(folder, tokens, prompt_length=3, new_tokens=4)
    assert (found.document, found.prompt) == ("näme 2", "\x05\x06\x07")  # 3, 1 and 4 tokens; bytes are their own ids
    assert found == draw_sample(folder, tokens, prompt_length=3, new_tokens=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert draw_sample(folder, tokens, prompt_length=9, new_tokens=1).prompt == "\x05\x06\x07\x08"  # else the longest

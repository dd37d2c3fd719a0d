"""`longctx generate` on a model folder writes what transformers writes: BOS, stop tokens and all settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizer_folders import write_folder

import longctx
from longctx.errors import ConfigError, ModelError
from longctx.generation.generator import Generator
from longctx.generation.request import Request
from longctx.mesh import Mesh

from distributed import run_ranks

FAMILIES = ("llama", "llama3", "qwen3", "gemma", "gpt2")
PROMPTS = ("It was a bright cold day", "def f(x): <|endoftext|> return", "naïve </s> day in <eos>April")
NEW = 80
# What a folder's generation_config.json may say besides stop tokens; greedy decoding heeds the penalties.
SETTINGS: dict[str, Any] = {
    "repetition_penalty": 1.3, "no_repeat_ngram_size": 6, "num_return_sequences": 2, "num_beams": 2, "temperature": 0.3,
    "do_sample": True, "cache_implementation": "hybrid", "max_length": 20,
}  # fmt: skip


def plain(folder: Path, prompt: str, **options: Any) -> tuple[list[int], str]:
    """New tokens and their text by transformers alone, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")
    one = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": NEW}
    made = model.generate(given["input_ids"], attention_mask=given["attention_mask"], **(one | options))
    new = made[0, given["input_ids"].shape[1] :]
    return new.tolist(), tokenizer.decode(new, skip_special_tokens=True)


def ours(
    folder: Path, prompt: str, mesh: Mesh, generator: Generator | None = None, **options: Any
) -> tuple[int, str, str]:
    """Number of new tokens, their text, and what was streamed."""
    written: list[str] = []
    asked = {"temperature": 0.0, "max_new_tokens": NEW} | options
    done = (generator or Generator(folder, mesh)).answer(Request(str(folder), prompt, **asked), written.append)
    return done.tokens, done.text, "".join(written)


def answers(folder: Path, mesh: Mesh) -> list[tuple[int, str, str]]:
    """What `ours` returns for every prompt."""
    generator = Generator(folder, mesh)
    return [ours(folder, prompt, mesh, generator) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders whose stop list holds a token that the model comes to write, and is not the tokenizer's own EOS."""
    made = {}
    for family in FAMILIES:
        folder = made[family] = write_folder(tmp_path_factory.mktemp(family), family, generation=SETTINGS)
        tokens, _ = plain(folder, PROMPTS[0])
        stop = next(token for place, token in enumerate(tokens) if place >= 40 and token not in tokens[:place])
        (folder / "generation_config.json").write_text(json.dumps(SETTINGS | {"eos_token_id": [stop, 1]}))
    return made


def on_a_ring(rank: int, world: int, folders: dict[str, Path]) -> dict[str, list[tuple[int, str, str]]]:
    mesh = longctx.Mesh(ring=world)
    return {family: answers(folder, mesh) for family, folder in folders.items()}


def test_greedy_text_is_that_of_transformers(folders: dict[str, Path]) -> None:
    """In one process and on a ring of two; the stream shows the text that comes out, also behind 64 tokens."""
    alone = Mesh(ring=1, world_size=1)
    ring = run_ranks(2, on_a_ring, folders, timeout=200)
    stopped = 0
    for family, folder in folders.items():
        truth = [plain(folder, prompt) for prompt in PROMPTS]
        expected = [(len(tokens), text, text) for tokens, text in truth]
        assert answers(folder, alone) == expected, family
        for rank in ring:
            assert rank[family] == expected, family
        assert len(truth[0][0]) < NEW, "the stop list of the folder ends it"
        stopped += sum(len(tokens) < NEW for tokens, _ in truth)
    assert 0 < stopped < len(folders) * len(PROMPTS), "some stop and some do not"


def test_beams_are_those_of_transformers(folders: dict[str, Path]) -> None:
    alone = Mesh(ring=1, world_size=1)
    for family in ("llama3", "gpt2"):
        tokens, text = plain(folders[family], PROMPTS[0], num_beams=3, max_new_tokens=12)
        made = ours(folders[family], PROMPTS[0], alone, beams=3, max_new_tokens=12, attention="kv")
        assert made == (len(tokens), text, text)


def test_a_prompt_of_one_token_and_stop_strings(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_folder(tmp_path / "a", "llama3")
    _, text = plain(folder, "")
    alone = Mesh(ring=1, world_size=1)
    assert ours(folder, "", alone)[1] == text, "BOS alone is a prompt"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    words = text[20:24]
    (folder / "generation_config.json").write_text(json.dumps({"stop_strings": [words]}))
    ids = tokenizer("", return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "stop_strings": [words]}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer, **options)
    assert ours(folder, "", alone)[:2] == (
        made.shape[1] - 1, tokenizer.decode(made[0, 1:], skip_special_tokens=True)
    )  # fmt: skip
    assert made.shape[1] < NEW


def guided(rank: int, world: int, folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        ours(folder, PROMPTS[0], longctx.Mesh(ring=world))
    return str(error.value)


def test_what_transformers_or_a_ring_cannot_do_is_said(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "gpt2", generation={"guidance_scale": 1.5})
    assert all("guidance_scale=1" in message for message in run_ranks(2, guided, folder))
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": -1.0}))
    with pytest.raises(ConfigError, match="transformers rejects these options with the folder's generation_config"):
        ours(folder, PROMPTS[0], Mesh(ring=1, world_size=1))

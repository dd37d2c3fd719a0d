"""`longctx generate` as a user types it: text on stdout, figures on stderr, one process or a ring."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models.zoo import tiny_config, tiny_model

import longctx
from longctx.data.tokenizers.tokenizer import ByteTokenizer, train_bpe
from longctx.errors import ConfigError
from longctx.generation import run
from longctx.generation.generator import Generator
from longctx.generation.request import Request, model_folder
from longctx.generation.stream import TextStream
from longctx.mesh import Mesh

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "It was a bright cold day in April, and the clocks were striking thirteen. "


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run directory with a Llama, and a folder with a GPT-2."""
    made = {}
    for name in ("llama", "gpt2"):
        run = tmp_path_factory.mktemp(name)
        folder = run / "model" if name == "llama" else run
        config = tiny_config(name)
        config.vocab_size = 257
        tiny_model(config, "sdpa").save_pretrained(folder)
        ByteTokenizer().save(folder)
        made[name] = run
    return made


def command(*arguments: object, stdin: str | bytes = "", **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"} | environment
    done = subprocess.run(
        [sys.executable, "-m", "longctx.cli", "generate", *(a if isinstance(a, bytes) else str(a) for a in arguments)],
        env=environment, cwd=ROOT, capture_output=True, timeout=280,
        input=stdin.encode() if isinstance(stdin, str) else stdin,
    )  # fmt: skip
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_ring_writes_what_one_process_writes(checkpoints: dict[str, Path]) -> None:
    common = (checkpoints["llama"], "--prompt", PROMPT, "--max-new-tokens", 8, "--seed", 3)
    alone, ring = command(*common), command(*common, "--ring", 2)
    assert "Loading weights" not in alone.stderr and len(alone.stderr.splitlines()) == 2, alone.stderr
    assert alone.returncode == 0 and ring.returncode == 0, alone.stderr + ring.stderr
    assert "tokens/s" in alone.stderr and "attention kv" in alone.stderr and "cache" in alone.stderr
    assert alone.stdout.strip() and ring.stdout == alone.stdout
    assert "one of 2" in ring.stderr and "rotates its keys by their positions" in ring.stderr


def test_one_prompt_after_another(checkpoints: dict[str, Path]) -> None:
    """A prompt that cannot be continued costs a line and not the session."""
    stdin = f"Hello\n\n{'long ' * 60}\nAgain\n"
    done = command(checkpoints["gpt2"], "--interactive", "--max-new-tokens", 3, stdin=stdin)
    assert done.returncode == 0 and done.stderr.count("tokens/s") == 2, done.stderr
    assert "a table of 256 positions" in done.stderr
    assert done.stdout.endswith("\n") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --prompt"),
        (("--prompt", "x y", "--prompt-file", "z"), "give one of --prompt"),
        (("--prompt", "xy", "--attention", "fast"), "choose one of auto, el, kv"),
        (("--prompt", "xy", "--temperature", "-1"), "--temperature -1.0: give a number from 0"),
        (("--prompt-file", "/nowhere"), "cannot be read"),
        (("--interactive", "--ring", "2"), "runs in one process"),
        (("--prompt", "xy", "--seed", str(2**64)), "--seed 18446744073709551616: give a number from 0 to"),
        (("--prompt", b"caf\xe9 au lait"), "the prompt is not UTF-8 text at its character 4; convert it"),
    ],
)
def test_mistakes(checkpoints: dict[str, Path], arguments: tuple[str | bytes, ...], message: str) -> None:
    done = command(checkpoints["llama"], *arguments)
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.deep
def test_text_that_is_not_utf8_and_a_terminal_that_is_not(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Bytes of another encoding are refused wherever they come in; characters that stdout lacks are written as \\x…"""
    for stdin, arguments in ((b"caf\xe9\n", ("--prompt-file", "-")), (b"caf\xe9\nHello\n", ("--interactive",))):
        done = command(checkpoints["gpt2"], *arguments, "--max-new-tokens", 3, stdin=stdin)
        assert "UTF-8" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == (0 if "--interactive" in arguments else 2)
    for ring in (1, 2):
        asked = ("--prompt", PROMPT, "--max-new-tokens", 30, "--seed", 1, "--temperature", 5, "--ring", ring)
        done = command(checkpoints["llama"], *asked, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
        assert done.returncode == 0 and done.stdout.isascii() and "\\ufffd" in done.stdout, done.stderr


def test_a_stopped_run_has_no_model_yet(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"`longctx export .*` writes one from its newest checkpoint"):
        model_folder(tmp_path)


def test_where_the_model_is(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    assert (
        model_folder(checkpoints["llama"]).name == "model" and model_folder(checkpoints["gpt2"]) == checkpoints["gpt2"]
    )
    with pytest.raises(ConfigError, match=r"no config.json there"):
        model_folder(tmp_path)


def test_hidden_states_give_the_same_text_from_half_the_cache(checkpoints: dict[str, Path]) -> None:
    generator = Generator(checkpoints["gpt2"], Mesh(ring=1, world_size=1))
    made = {}
    for attention in ("kv", "el", "auto"):
        written = io.StringIO()
        request = Request(str(checkpoints["gpt2"]), PROMPT, max_new_tokens=12, attention=attention, seed=1)
        made[attention] = generator.answer(request, written.write)
        assert written.getvalue() == made[attention].text
    assert made["el"].text == made["kv"].text and made["el"].cache_bytes * 2 == made["kv"].cache_bytes
    assert made["auto"].attention.method == "kv", "nothing here is short of memory"
    assert "both fit" in made["auto"].attention.reason and made["el"].attention.reason == "as asked"
    beams = Request(str(checkpoints["gpt2"]), PROMPT, max_new_tokens=12, beams=3, attention="el")
    hidden = generator.answer(beams, lambda text: None)
    kept = generator.answer(Request(**(vars(beams) | {"attention": "kv"})), lambda text: None)
    assert hidden.text == kept.text and kept.cache_bytes == 2 * hidden.cache_bytes, "beams share their prompt in both"
    assert hidden.seconds_to_first_token is None and 0 < made["kv"].seconds_to_first_token <= made["kv"].seconds


def test_learned_positions_end_where_they_end(checkpoints: dict[str, Path]) -> None:
    """The last token is written and not read, so it needs no position; turned keys go on."""
    generator = Generator(checkpoints["gpt2"], Mesh(ring=1, world_size=1))
    asked: dict[str, Any] = {"folder": str(checkpoints["gpt2"]), "prompt": "x" * 250, "temperature": 0.0}
    assert generator.answer(Request(**asked, max_new_tokens=7), lambda text: None).prompt_tokens == 250
    with pytest.raises(ConfigError, match=r"a table of 256 positions; give --max-new-tokens 7 or less"):
        generator.answer(Request(**asked, max_new_tokens=8), lambda text: None)
    with pytest.raises(ConfigError, match=r"shorten the prompt"):
        generator.answer(Request(**asked | {"prompt": "x" * 300}), lambda text: None)
    turned = Generator(checkpoints["llama"] / "model", Mesh(ring=1, world_size=1))
    assert turned.answer(Request(**asked, max_new_tokens=8), lambda text: None).prompt_tokens == 250


def test_too_little_memory_for_keys_and_values(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(checkpoints["gpt2"], Mesh(ring=1, world_size=1))
    monkeypatch.setattr(run, "_free_memory", lambda device: 2 * 30_000)
    done = generator.answer(Request(str(checkpoints["gpt2"]), PROMPT, max_new_tokens=12), lambda text: None)
    assert done.attention.method == "el" and "only the latter fit in 29.3 KiB" in done.attention.reason


def test_a_model_with_bounded_memories(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    config.vocab_size = 257
    model = longctx.convert(tiny_model(config, "longctx"), {"1": "cosine"})
    model.save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    generator = Generator(tmp_path, Mesh(ring=1, world_size=1))
    texts = {
        kind: generator.answer(Request(str(tmp_path), PROMPT, max_new_tokens=8, attention=kind), lambda text: None).text
        for kind in ("kv", "el")
    }
    assert texts["kv"] == texts["el"]


def test_a_stream_is_the_text(tmp_path: Path) -> None:
    """Also where a character comes in several tokens, and after many of them."""
    import torch

    text = "naïve café — 東京 🎉 " * 30
    for tokenizer in (ByteTokenizer(), train_bpe([text], 300)):
        written: list[str] = []
        stream = TextStream(tokenizer, written.append)
        stream.put(torch.tensor([[1, 2, 3]]))
        for token in tokenizer.encode(text).tolist():
            stream.put(torch.tensor([token]))
        stream.end()
        assert "".join(written) == text and len(written) > 100

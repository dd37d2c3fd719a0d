"""Tokenizer folders: what a folder says is kept byte by byte, and nothing of an older tokenizer stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizer_folders import FAMILIES, write_tokenizer

from longctx.data.tokenizers import folder as tokenizer_folder
from longctx.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer, require_kept
from longctx.errors import DataError

TEXT = "It was a <|endoftext|> bright\n\n  day in April </s> naïve <eos>"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_and_a_name_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoTokenizer

    source = write_tokenizer(tmp_path / "source", family)
    theirs, ours = AutoTokenizer.from_pretrained(source), load_tokenizer(source)
    assert ours.prompt(TEXT).tolist() == theirs(TEXT)["input_ids"]
    assert (ours.end_of_document, ours.beginning) == (theirs.eos_token_id, theirs.bos_token_id)
    assert (ours.prefix == (theirs.bos_token_id,)) is (family in ("llama", "llama3", "gemma")) and not ours.suffix
    ids = theirs("bright day in April", add_special_tokens=False)["input_ids"]
    assert ours.encode("bright day in April").tolist() == ids and ours.decode(ids) == theirs.decode(ids)
    ByteTokenizer().save(tmp_path / "copy")
    (tmp_path / "copy" / "vocab.txt").write_text("of another tokenizer")
    ours.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert again.hash == ours.hash and again.prompt(TEXT).tolist() == ours.prompt(TEXT).tolist()
    copied = {path.name for path in (tmp_path / "copy").iterdir()} - {"config.json"}
    assert copied == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in copied:
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()


def test_a_models_config_stays(tmp_path: Path) -> None:
    """A tokenizer may be saved into a model's folder."""
    config = write_tokenizer(tmp_path, "gpt2") / "config.json"
    config.write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    before = config.read_bytes()
    ByteTokenizer().save(tmp_path)
    load_tokenizer(write_tokenizer(tmp_path / "other", "llama3")).save(tmp_path)
    assert config.read_bytes() == before


@pytest.mark.parametrize("own", ["bytes", "llama3"])
def test_a_tokenizer_that_a_model_type_replaces_is_refused(tmp_path: Path, own: str) -> None:
    """Beside a Qwen 2 model, transformers builds Qwen's own splitting around any vocabulary."""
    given = ByteTokenizer() if own == "bytes" else load_tokenizer(write_tokenizer(tmp_path / "a", own))
    for architecture in ("llama", "qwen3", "gpt2", "mistral", "gemma3_text"):
        require_kept(given, architecture)
    with pytest.raises(DataError, match="model.architecture qwen2: .* as a Qwen2Tokenizer"):
        require_kept(given, "qwen2")
    require_kept(load_tokenizer(write_tokenizer(tmp_path / "b", "qwen3")), "qwen2")


def test_what_is_put_around_a_text_is_part_of_the_name(tmp_path: Path) -> None:
    with_bos = load_tokenizer(write_tokenizer(tmp_path / "a", "llama3"))
    folder = write_tokenizer(tmp_path / "b", "llama3")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    without = load_tokenizer(folder)
    assert with_bos.prefix and not without.prefix and with_bos.hash != without.hash


def test_further_templates_are_copied_and_code_is_never_run(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "a", "gpt2")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    (source / "model.safetensors").write_text("not a tokenizer's")
    (source / "tokenizer.py").write_text("raise SystemExit")
    tokenizer_folder.copy(source, tmp_path / "b")
    names = [str(path) for path in tokenizer_folder.files(tmp_path / "b")]
    assert "additional_chat_templates/tools.jinja" in names and "model.safetensors" not in names
    assert not (tmp_path / "b" / "tokenizer.py").exists() and not (tmp_path / "b" / "config.json").exists()
    write_tokenizer(source, "gpt2", auto_map={"AutoTokenizer": ["tokenizer.Mine", None]}, tokenizer_class="Mine")
    assert load_tokenizer(source).prompt("It was").size
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json cannot be read"):
        load_tokenizer(source)

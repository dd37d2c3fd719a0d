"""A pretrained folder and its tokenizer are read before anything is built: what does not fit is told with its key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config_samples import BASE, text_of, variant
from pretrained_folders import GPT2, LLAMA, gpt2_weights, llama_weights, pretrained_folder
from transformers import AutoTokenizer

from longctx.config.load import loads, require_machine
from longctx.config.problems import InvalidConfig
from longctx.data.build import build_tokens
from longctx.data.tokenizers.tokenizer import train_bpe

FROM_FOLDER: dict[str, Any] = {f"model__{key}": ... for key in BASE["model"] if key != "dtype"}
FROM_FOLDER |= {"data__tokenizer": ..., "data__vocab_size": ...}


def findings(folder: Path | str, **changes: Any) -> list[tuple[str, str]]:
    """Return (key, message) of all that a run of a pretrained folder is told."""
    tree = variant(**{**FROM_FOLDER, "model__pretrained": str(folder), **changes})
    try:
        require_machine(loads(text_of(tree), name="run.yaml"), starting=False)
    except InvalidConfig as error:
        return [(problem.key, problem.message) for problem in error.problems]
    return []


def told(folder: Path | str, **changes: Any) -> tuple[str, str]:
    """Return the one thing that is told."""
    (found,) = findings(folder, **changes)
    return found


def test_the_folders_own_tokenizer_is_the_default(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model")
    loaded = loads(text_of(variant(**FROM_FOLDER, model__pretrained=str(folder))))
    assert loaded.config.data.tokenizer == str(folder) and require_machine(loaded) == []
    from_scratch = loads(text_of(variant(data__tokenizer=...)))
    assert from_scratch.config.data.tokenizer == "bpe"
    foreign = variant(**FROM_FOLDER, model__pretrained=str(folder), data__foreign_tokenizer=True)
    assert loads(text_of(foreign)).config.data.tokenizer == "bpe"


def test_another_tokenizer_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model", tokenizer=train_bpe(["words and more words"], 280))
    train_bpe(["other text entirely, other text"], 280).save(tmp_path / "other")
    for name in ("bpe", "bytes", str(tmp_path / "other"), str(tmp_path / "other" / "tokenizer.json")):
        key, message = told(folder, data__tokenizer=name)
        assert key == "data.tokenizer" and "remove the key" in message and "data.foreign_tokenizer: true" in message
        assert findings(folder, data__tokenizer=name, data__foreign_tokenizer=True) == []
    for same in (folder, folder / "tokenizer.json"):
        assert findings(folder, data__tokenizer=str(same)) == []
    copy = tmp_path / "copy.json"
    copy.write_bytes((folder / "tokenizer.json").read_bytes())
    assert findings(folder, data__tokenizer=str(copy)) == []
    assert findings(pretrained_folder(tmp_path / "bytes"), data__tokenizer="bytes") == []
    key, message = told(folder, data__vocab_size=300)
    assert key == "data.vocab_size" and "only for tokenizer: bpe" in message


def test_a_tokenizer_that_transformers_has_written_again_is_no_other(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model", tokenizer=train_bpe(["words and more words"], 280))
    settings = folder / "tokenizer_config.json"
    described = {**json.loads(settings.read_text()), "tokenizer_class": "Qwen2Tokenizer"}  # splits text in its own way
    settings.write_text(json.dumps(described))
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    first, again = (json.loads((place / "tokenizer.json").read_text()) for place in (folder, tmp_path / "again"))
    assert first["pre_tokenizer"] != again["pre_tokenizer"]
    assert findings(folder, data__tokenizer=str(tmp_path / "again")) == []
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    build_tokens(tmp_path / "text.txt", str(folder), tmp_path / "built")
    assert findings(folder, data__sources=[str(tmp_path / "built")]) == []


def test_a_foreign_tokenizer_means_nothing_from_scratch() -> None:
    with pytest.raises(InvalidConfig, match=r"data.foreign_tokenizer: has no effect without model.pretrained"):
        loads(text_of(variant(data__foreign_tokenizer=True)))


def test_tokens_that_another_tokenizer_has_made_are_refused(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("some text\n" * 50)
    build_tokens(text, "bytes", tmp_path / "bytes")
    build_tokens(text, "bpe", tmp_path / "bpe", vocabulary_size=270)
    assert findings(folder, data__sources=[str(tmp_path / "bytes")]) == []
    key, message = told(folder, data__sources=[str(tmp_path / "bpe")])
    assert key == "data.sources" and "another tokenizer" in message
    assert findings(folder, data__sources=[str(tmp_path / "bpe")], data__foreign_tokenizer=True) == []


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model", weights=llama_weights(vocabulary=200), vocab_size=200)
    key, message = told(folder)
    assert key == "data.tokenizer" and "257 ids" in message and "200 rows" in message
    assert "model.vocab_size" not in message  # which is refused beside model.pretrained
    assert told(folder, data__tokenizer="bytes")[0] == "data.tokenizer"


def test_folders_without_a_tokenizer_say_what_to_do(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model")
    own = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer of its own" in told(folder)[1]
    (folder / "tokenizer.model").write_bytes(b"x")
    assert "holds tokenizer.model" in told(folder)[1] and "save_pretrained" in told(folder)[1]
    (tmp_path / "given.json").write_bytes(own)
    assert findings(folder, data__tokenizer=str(tmp_path / "given.json")) == []
    assert told(folder, data__tokenizer="bytes")[0] == "data.tokenizer"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"_attn_implementation_internal": "kernels-community/x"}, "_attn_implementation_internal"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "images or sound"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, above 4096"),
        ({"vocab_size": 301}, "has 300 rows, but config.json says vocab_size 301"),
        ({"num_hidden_layers": 3}, "weights of layer 2 are not there"),
        ({"intermediate_size": 65}, "mlp.gate_proj.weight of layer 0 is 64 x 32"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ],
)
def test_a_folder_of_another_model_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    key, text = told(pretrained_folder(tmp_path / "model", **changes))
    assert key == "model.pretrained" and message in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"not json", "not valid JSON"),
        ("config.json", b"[" * 100_000, "not valid JSON"),
        ("config.json", b"[1]", "not an object"),
        ("config.json", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("config.json", None, "no config.json"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("model.safetensors", b"1234567", "truncated"),
        ("model.safetensors", None, "no model.safetensors"),
        ("adapter_config.json", b"{}", "adapter"),
        ("model.safetensors.index.json", None, ""),
    ],
)
def test_damaged_folders(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    folder = pretrained_folder(tmp_path / "model")
    if content is None:
        (folder / name).unlink(missing_ok=True)
    else:
        (folder / name).write_bytes(content)
    found = findings(folder)
    assert [key for key, _ in found] == (["model.pretrained"] if message else [])
    assert not message or message in found[0][1]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {name: "model-00001-of-00002.safetensors" for name in llama_weights()}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert findings(folder) == []
    index.write_text(json.dumps({"weight_map": {**weight_map, "x": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors is missing" in told(folder)[1]


def test_rows_beyond_the_models_positions_are_refused(tmp_path: Path) -> None:
    llama = pretrained_folder(tmp_path / "llama", max_position_embeddings=2048)
    key, message = told(llama)
    assert key == "data.sequence_length" and "2,048 positions" in message and "model.max_positions to 4096" in message
    assert findings(llama, model__max_positions=4096) == []
    assert told(llama, model__max_positions=1024, data__sequence_length=1024)[0] == "model.max_positions"
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    assert findings(llama, model__max_positions=4096, model__extra=scaled) == []
    assert told(llama, model__max_positions=4096, model__extra={"hidden_act": "relu"})[0] == "model.extra.hidden_act"

    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    meant = pretrained_folder(tmp_path / "yarn", max_position_embeddings=2048, rope_parameters=yarn)
    key, message = told(meant, model__max_positions=4096)
    assert key == "model.max_positions" and "original_max_position_embeddings" in message
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert findings(pretrained_folder(tmp_path / "dynamic", max_position_embeddings=2048, **dynamic)) == []


def test_learned_positions_cannot_be_raised(tmp_path: Path) -> None:
    gpt2 = pretrained_folder(tmp_path / "gpt2", GPT2, gpt2_weights())
    assert findings(gpt2) == []
    assert told(gpt2, model__max_positions=16384)[0] == "model.max_positions"
    short = pretrained_folder(tmp_path / "short", GPT2, gpt2_weights(1024), n_positions=1024)
    key, message = told(short)
    assert key == "data.sequence_length" and "1,024 positions are learned" in message
    assert "max_positions" not in message


def test_addresses_are_refused_and_their_keys_are_not_shown() -> None:
    for name in ("data__tokenizer", "model__pretrained", "output__folder", "data__folder"):
        address = "s3://AKIAIOSFODNN7EXAMPLE:secretsecret@bucket/x"
        changes = {**FROM_FOLDER, "model__pretrained": "m", name: address}
        with pytest.raises(InvalidConfig) as caught:
            require_machine(loads(text_of(variant(**changes))))
        assert "AKIA" not in str(caught.value) and "secretsecret" not in str(caught.value)
        assert name.replace("__", ".") in {problem.key for problem in caught.value.problems}


def test_a_folder_is_checked_without_torch(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model")
    config = tmp_path / "run.yaml"
    changes = {**FROM_FOLDER, "model__pretrained": str(folder), "output__folder": str(tmp_path / "run")}
    config.write_text(text_of(variant(**changes)))
    code = (
        "import sys; from longctx.config.load import load_for_machine; from longctx.config.derived import derive; "
        f"loaded, _ = load_for_machine({str(config)!r}); print(derive(loaded.config, 4).parameters); "
        "print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [str(sum(value.size for value in llama_weights().values())), "set()"], done


def test_every_sample_passes(tmp_path: Path) -> None:
    assert findings(pretrained_folder(tmp_path / "llama", LLAMA)) == []

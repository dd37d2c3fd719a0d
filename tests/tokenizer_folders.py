"""Model folders like those that people download, made here: a tokenizer of each family, a tiny model, odd settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXTS = ["It was a bright cold day in April, and the clocks struck thirteen. " * 3, "def f(x):\n  return x\n" * 9]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
FAMILIES = ("llama", "llama3", "qwen3", "gemma", "gpt2")


def make_tokenizer(family: str) -> Any:
    """Return a transformers tokenizer as the family has it: its own class, special tokens and chat template."""
    import transformers as t

    if family == "llama3":
        base = t.GPT2Tokenizer().train_new_from_iterator(TEXTS, 300)
        backend = base.backend_tokenizer
        names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
        backend.add_special_tokens(names)
        import tokenizers

        begin = backend.token_to_id(names[0])
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{names[0]} $A", pair=f"{names[0]} $A {names[0]} $B", special_tokens=[(names[0], begin)]
        )
        made = t.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[0], eos_token=names[1])
    else:
        kinds = {"llama": "Llama", "qwen3": "Qwen2", "gemma": "Gemma", "gpt2": "GPT2"}
        made = getattr(t, f"{kinds[family]}Tokenizer")().train_new_from_iterator(TEXTS, 300)
        if family in ("llama", "gemma"):
            made.add_bos_token = True
            made.update_post_processor()
    made.chat_template = TEMPLATE
    made.model_max_length = 777
    return made


def write_tokenizer(folder: Path, family: str, **changed: Any) -> Path:
    """Write the tokenizer of a family, with a config.json that names its model type; return the folder.

    Args:
        changed: keys of tokenizer_config.json to change; None removes one.
    """
    make_tokenizer(family).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama" if family == "llama3" else family}))
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text()) | {"padding_side": "left"} | changed
    settings.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def write_folder(folder: Path, family: str, dtype: str = "float32", generation: dict[str, Any] | None = None) -> Path:
    """Write a whole model folder of a family, with weights of ``dtype``, and return it.

    Args:
        generation: content of generation_config.json; None removes the file.
    """
    import torch
    from models.zoo import tiny_config, tiny_model

    write_tokenizer(folder, family)
    tokenizer = make_tokenizer(family)
    tied = {} if family in ("llama", "llama3") else {"tie_word_embeddings": True}
    config = tiny_config({"llama3": "llama"}.get(family, family), **tied)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    tiny_model(config, "sdpa").to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder

"""Sample from the trained model: plain transformers loads the exported folder and continues a held-out document."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from longctx.data.tokenizers.tokenizer import load_tokenizer
from longctx.data.tokens.file import TokenFile
from longctx.models.convert import converted
from longctx.models.load.pretrained import load_pretrained

TEMPERATURE = 0.8
TOP_K = 50


@dataclass(frozen=True)
class Sample:
    """A document's name, its beginning, and the model's continuation."""

    document: str
    prompt: str
    continuation: str


def draw_sample(model_folder: Path, tokens: Path, prompt_length: int, new_tokens: int, seed: int = 0) -> Sample:
    """Continue the first document of ``tokens`` that is longer than the prompt; on the CPU, in one process.

    Args:
        model_folder: written by ``export_model``, with its tokenizer.
        tokens: a token file of held-out documents.
        prompt_length: length of the prompt in tokens.
        new_tokens: number of tokens to generate.
    """
    tokenizer = load_tokenizer(model_folder)
    with TokenFile(tokens) as file:
        lengths = file.offsets[1:] - file.offsets[:-1]
        longer = [int(n) for n in (lengths > prompt_length).nonzero()[0][:1]] or [int(lengths.argmax())]
        prompt = file.document(longer[0])[:prompt_length].astype("int64")
        name = file.name(longer[0])
    model = load_pretrained(model_folder)
    if not converted(model.config):
        model.set_attn_implementation("sdpa")  # plain transformers, as a user of the exported folder runs it
    model.eval()
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    ids = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            use_cache=True,
            tokenizer=tokenizer.transformers,  # for stop strings of the generation config
            num_beams=1,
            num_return_sequences=1,
            pad_token_id=tokenizer.end_of_document,
        )
    torch.set_rng_state(state)
    return Sample(name, tokenizer.decode(prompt), tokenizer.decode(written[0, len(prompt) :].numpy()))

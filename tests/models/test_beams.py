"""share_beams: the tokens of generate(), from prompts and encoder outputs that all beams of a row share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.test_el import MODES, generate, make, shape_of
from models.zoo import tiny_config, tiny_model

from longctx.decode.caches.size import cache_bytes
from longctx.decode.cost import kv_bytes
from longctx.errors import ModelError
from longctx.generation.beams import share_beams, unshare_beams


@pytest.mark.parametrize("mode", ["greedy", "beam", "two of four beams", "sampling", "static beams"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bart", "marian"])
def test_the_same_tokens_as_generate(name: str, mode: str) -> None:
    model = make(name)
    theirs = generate(model, **MODES[mode])
    share_beams(model)
    ours = generate(model, **MODES[mode])
    unshare_beams(model)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(generate(model, **MODES[mode]).sequences, theirs.sequences)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rotary_models_and_grouped_keys(name: str) -> None:
    model = tiny_model(tiny_config(name), "sdpa").eval()
    ids = torch.arange(18).view(2, 9) + 2
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 1}
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    share_beams(model)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), theirs)


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_the_cache_holds_what_the_formula_says(name: str) -> None:
    model = make(name)
    share_beams(model)
    made = generate(model, num_beams=4, max_new_tokens=6, min_new_tokens=6)
    assert cache_bytes(made.past_key_values) == kv_bytes(shape_of(model, 4, 5), shared_prompt=True)


def test_a_bias_of_positions_is_refused() -> None:
    with pytest.raises(ModelError, match="position bias"):
        share_beams(make("t5"))

"""Diverse (group) beam search from hidden states.

transformers 5 has moved it out of the library: generate(num_beam_groups=…) asks to run code of another repository. Who
has such a decoding method hands it to generate() as custom_generate, and so does this test, with one of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.test_el import make, prompts

import longctx
from longctx.generation.beams import share_beams

GROUPS, EACH, NEW = 2, 2, 7


def diverse_beams(model: Any, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> torch.Tensor:
    """Vijayakumar et al. 2018: groups search one after another and pay for tokens that earlier groups have chosen."""
    for name in ("logits_processor", "stopping_criteria", "synced_gpus", "streamer"):
        kwargs.pop(name, None)
    rows, beams = input_ids.shape[0] // (GROUPS * EACH), GROUPS * EACH
    scores = torch.tensor([0.0] + [-torch.inf] * (EACH - 1)).repeat(rows, GROUPS)
    for _ in range(NEW):
        out = model(**model.prepare_inputs_for_generation(input_ids, **kwargs), return_dict=True)
        likely = out.logits[:, -1].float().log_softmax(-1).view(rows, beams, -1)
        words, chosen, homes = likely.shape[-1], [], []
        taken = torch.zeros(rows, words)
        for group in range(GROUPS):
            here = slice(group * EACH, (group + 1) * EACH)
            total = scores[:, here, None] + likely[:, here] - 1.5 * taken[:, None]
            best, index = total.flatten(1).topk(EACH)
            token = index % words
            scores[:, here] = best + 1.5 * taken.gather(1, token)
            taken.scatter_add_(1, token, torch.ones_like(best))
            chosen.append(token)
            homes.append(index // words + group * EACH + torch.arange(rows)[:, None] * beams)
        order = torch.cat(homes, 1).flatten()
        input_ids = torch.cat((input_ids[order], torch.cat(chosen, 1).view(-1, 1)), 1)
        kwargs = model._update_model_kwargs_for_generation(out, kwargs, model.config.is_encoder_decoder)
        kwargs["past_key_values"].reorder_cache(order)
    return input_ids


def generate(model: Any) -> torch.Tensor:
    options = {"num_beams": GROUPS * EACH, "num_return_sequences": GROUPS * EACH, "custom_generate": diverse_beams}
    tokens: torch.Tensor = model.generate(**prompts(model.config.is_encoder_decoder), **options, max_new_tokens=NEW)
    return tokens


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5"])
def test_the_same_tokens_as_with_keys_and_values(name: str) -> None:
    model = make(name)
    theirs = generate(model)
    first, second = theirs.view(3, GROUPS, EACH, -1).unbind(1)
    assert not torch.equal(first, second), "groups differ"
    longctx.enable_el(model)
    assert torch.equal(generate(model), theirs)
    longctx.disable_el(model)
    if name != "t5":
        share_beams(model)
        assert torch.equal(generate(model), theirs)


def test_the_library_itself_has_it_no_longer() -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        make("gpt2").generate(**prompts(False), num_beams=4, num_beam_groups=2, diversity_penalty=1.0, max_new_tokens=3)
